"""A stand-in for the Hugging Face hub: what pushing and pulling a library needs of its HTTP interface."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler

from tests.servers import served_by


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: `server.files[path]`; `server.commits`: the paths that each commit changed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _send(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer hf_test":
            self._send({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.server.repository = json.loads(body)
            self._send(
                {
                    "url": f"{self.server.address}/datasets/maker/cars",
                    "id": "maker/cars",
                    "name": "maker/cars",
                }
            )
        elif path == "/api/datasets/maker/cars/preupload/main":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._send({"files": modes})
        elif path == "/api/datasets/maker/cars/commit/main":
            changed = []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[value["path"]]
                if line["key"] != "header":
                    changed.append(value["path"])
            self.server.commits.append(changed)
            self._send(
                {
                    "success": True,
                    "commitOid": self._head(),
                    "commitUrl": f"{self.server.address}/datasets/maker/cars/commit/{self._head()}",
                }
            )
        else:
            self._send({"error": path}, 404)

    def _head(self) -> str:
        return f"{len(self.server.commits):040x}"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        if re.fullmatch(r"/api/datasets/maker/cars/tree/\w+", path):
            self._send([self._entry(name) for name in sorted(files)])
        elif re.fullmatch(r"/api/datasets/maker/cars(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._send(
                {"id": "maker/cars", "sha": self._head(), "siblings": siblings, "tags": [], "private": False}
            )
        elif found := re.fullmatch(r"/datasets/maker/cars/resolve/\w+/(.+)", path):
            if found[1] in files:
                headers = {"ETag": f'"{self._entry(found[1])["oid"]}"', "X-Repo-Commit": self._head()}
                self._send(files[found[1]], headers=headers)
            else:
                self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._head()})
        else:
            self._send({"error": path}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _entry(self, name: str) -> dict:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def hub_served():
    """Serves an empty hub on this machine."""
    return served_by(Hub, files={".gitattributes": b""}, commits=[], repository=None)
