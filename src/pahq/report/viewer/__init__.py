"""The circuit viewer: one HTML file that shows a circuit, without network or server."""
