"""A hub on loopback with the few endpoints that a download asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the hub holds, and what it was asked.

    Fields:
        repositories: files of each repository, by its id.
        refusals: status and ``X-Error-Code`` of those that are refused.
        asked: methods and paths.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def add(self, name: str, directory: Path) -> None:
        """Put a directory's files into a repository."""
        self.repositories[name] = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def blob_id(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub that answers until the end."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            name = path.removeprefix("/api/models").strip("/")
            name = "/".join(name.split("/")[:2])
            if name in hub.refusals:
                code, kind = hub.refusals[name]
                return self.answer(code, b"{}", {"X-Error-Code": kind})
            files = hub.repositories.get(name)
            if files is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            rest = path.removeprefix("/api/models").removeprefix(f"/{name}").strip("/")
            kind, _, rest = rest.partition("/")
            if kind == "resolve":
                return self.send_file(files, rest)
            if rest not in ("main", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            listed = [{"path": file, "size": len(c), "oid": blob_id(c), "type": "file"} for file, c in files.items()]
            if kind == "tree":
                return self.answer(200, json.dumps(listed).encode())
            siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]} for file in listed]
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

        do_HEAD = do_GET

        def send_file(self, files: dict[str, bytes], rest: str) -> None:
            file = rest.partition("/")[2]
            if file not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{blob_id(files[file])}"', "X-Repo-Commit": COMMIT}
            self.answer(200, files[file], headers)

        def answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """The test's output stays clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
