"""A stand-in for S3 on this machine: objects in memory, lists, and writes on condition (ETags)."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape


class Bucket(BaseHTTPRequestHandler):
    """Serves `objects`, by path. Of writers that meet, the lock lets one decide at a time."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    parts: dict[tuple[str, int], bytes]
    refused: list[str]
    lock: threading.Lock

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_PUT(self):
        url, content = urlsplit(self.path), self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(url.path)
        if "partNumber" in url.query:
            self.parts[path, int(parse_qs(url.query)["partNumber"][0])] = content
            return self.answer(200, ETag=tag(content))
        with self.lock:
            there = self.objects.get(path)
            missed = self.headers["If-None-Match"] == "*" and there is not None
            expected = self.headers["If-Match"]
            if missed or expected and (there is None or tag(there) != expected):
                self.refused.append(path)
                return self.answer(412)
            self.objects[path] = content
        return self.answer(200, ETag=tag(content))

    def do_GET(self):
        url = urlsplit(self.path)
        if "list-type" in url.query:
            return self.answer(200, listed(self.objects, unquote(url.path), parse_qs(url.query)["prefix"][0]))
        content = self.objects.get(unquote(url.path))
        if content is None:
            return self.answer(404)
        return self.answer(200, content, ETag=tag(content), Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")

    do_HEAD = do_GET

    def do_POST(self):
        """Begins and ends the writing of a large object in parts, or deletes the objects of a list."""
        url, text = urlsplit(self.path), self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        path = unquote(url.path)
        if "uploads" in url.query:
            return self.answer(
                200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            )
        if "uploadId" in url.query:
            numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)<", text)]
            self.objects[path] = content = b"".join(self.parts.pop((path, number)) for number in numbers)
            found = f"<CompleteMultipartUploadResult><ETag>{escape(tag(content))}</ETag>"
            return self.answer(200, f"{found}</CompleteMultipartUploadResult>".encode())
        keys = [unescape(key) for key in re.findall("<Key>(.*?)</Key>", text)]
        for key in keys:
            self.objects.pop(f"{unquote(url.path)}/{key}", None)
        lines = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{lines}</DeleteResult>".encode())

    def log_message(self, *_):
        pass


def tag(content):
    return f'"{hashlib.md5(content).hexdigest()}"'


def listed(objects, bucket, prefix):
    lines = [
        f"<Contents><Key>{escape(path[len(bucket) + 1 :])}</Key><Size>{len(content)}</Size>"
        f"<ETag>{escape(tag(content))}</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for path, content in sorted(objects.items())
        if path.startswith(f"{bucket}/{prefix}")
    ]
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(lines)}</ListBucketResult>".encode()


@contextmanager
def serving_bucket(monkeypatch):
    """Serves an S3 of this machine, which obstore finds by the environment. Yields what it keeps."""
    kept = type("Kept", (Bucket,), {"objects": {}, "parts": {}, "refused": [], "lock": threading.Lock()})
    with ThreadingHTTPServer(("127.0.0.1", 0), kept) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        settings = {"ENDPOINT": address, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true", "REGION": "x"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        try:
            yield kept
        finally:
            server.shutdown()
