"""As much of W&B's server as a run needs, on this machine: it keeps what it is sent, and can be gone in an instant."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """stream: file -> the lines that were sent of it. operations: GraphQL operations asked for, in their order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stream: dict[str, list[dict[str, Any]]] = {}
        self.operations: list[str] = []
        self.gone = False
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is none of ours."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, data: bytes) -> dict[str, Any]:
        if path != "/graphql":
            for name, part in json.loads(data).get("files", {}).items() if "file_stream" in path else ():
                self.stream.setdefault(name, []).extend(json.loads(line) for line in part["content"])
            return {}
        asked = json.loads(data)
        operation, given = asked["operationName"], asked.get("variables") or {}
        self.operations.append(operation)
        if operation == "RunResumeStatus":
            return {"data": {"model": {"name": given["project"], "bucket": None}}}
        if operation == "Viewer":
            return {
                "data": {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            }
        if operation == "UpsertBucket":
            project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
            names = {"name": given.get("name"), "displayName": given.get("displayName")}
            bucket = {"id": "b", **names, "config": "{}", "historyLineCount": 0, "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"errors": [{"message": f"{operation} is not for tests"}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.gone:
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        answer = json.dumps(server.answer(self.path, data)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST
