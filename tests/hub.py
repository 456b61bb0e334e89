"""A hub on this machine: it answers what `datasets` asks of huggingface.co to stream data sets at one revision."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote

# Data set -> its one revision, and its files.
Served = dict[str, tuple[str, dict[str, bytes]]]
ROUTES = {
    "resolve": r"/datasets/(?P<name>[\w.-]+/[\w.-]+)/resolve/(?P<revision>\w+)/(?P<path>.+)",
    "info": r"/api/datasets/(?P<name>[\w.-]+/[\w.-]+)/revision/(?P<revision>\w+)",
    "tree": r"/api/datasets/(?P<name>[\w.-]+/[\w.-]+)/tree/(?P<revision>\w+)/?(?P<path>.*)",
    "paths": r"/api/datasets/(?P<name>[\w.-]+/[\w.-]+)/paths-info/(?P<revision>\w+)",
}


@contextmanager
def hub(served: Served) -> Iterator[str]:
    """Serve data sets and yield the address, for HF_ENDPOINT. What is not there gets status 404."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"served": served}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        place = unquote(self.path.partition("?")[0])
        for kind, pattern in ROUTES.items():
            if (found := re.fullmatch(pattern, place)) and found["name"] in self.served:
                revision, files = self.served[found["name"]]
                if found["revision"] == revision:
                    return getattr(self, f"_{kind}")(files, revision, found.groupdict(), body)
        self._send(b"", 404)

    do_HEAD = do_POST = do_GET

    def _resolve(self, files: dict[str, bytes], revision: str, asked: dict[str, str], _body: str) -> None:
        if (data := files.get(asked["path"])) is None:
            return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": revision, "ETag": f'"{len(data)}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(data[start : end + 1], 206, headers)
        return self._send(data, 200, headers)

    def _info(self, files: dict[str, bytes], revision: str, asked: dict[str, str], _body: str) -> None:
        self._json({"id": asked["name"], "sha": revision, "siblings": [{"rfilename": file} for file in files]})

    def _tree(self, files: dict[str, bytes], revision: str, asked: dict[str, str], _body: str) -> None:
        above = f"{asked['path']}/" if asked["path"] else ""
        below = {file.removeprefix(above): file for file in files if file.startswith(above)}
        folders = sorted({name.partition("/")[0] for name in below if "/" in name})
        found = [_file(file, files) for name, file in below.items() if "/" not in name]
        self._json([{"type": "directory", "path": f"{above}{each}", "oid": revision} for each in folders] + found)

    def _paths(self, files: dict[str, bytes], _revision: str, _asked: dict[str, str], body: str) -> None:
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._json([_file(file, files) for file in files if file in wanted])

    def _json(self, answer: Any) -> None:
        self._send(json.dumps(answer).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, data: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def _file(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
