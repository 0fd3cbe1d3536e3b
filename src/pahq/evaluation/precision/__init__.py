"""What low precision does to a model's edges: by layer, by component, and by how many heads stay in FP32."""
