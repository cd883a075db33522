"""A Hub on 127.0.0.1: the endpoints that the client calls, a file host behind redirects, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Seen:
    """One request: on which host, what for, and how many bytes of a body were sent."""

    host: str
    method: str
    path: str
    range: str
    token: str
    sent: int = 0


@dataclass
class Fault:
    """What to do instead, the next ``times`` times that a path matches."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1
    extra: int = 0
    missing: int = 0
    ignore_range: bool = False
    shift: int = 0
    body: bytes = b""
    times: int = 10**9


class HubServer:
    """Repositories as dictionaries: name → {path: bytes}."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refs = {"main": COMMIT, COMMIT: COMMIT, "refs/pr/1": COMMIT, "v1": COMMIT}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.listed: dict[str, bytes] = {}
        """Content that the listing describes where it differs from what is sent."""

    def bodies(self, pattern: str = "") -> int:
        """Bytes sent in bodies for matching paths."""
        return sum(seen.sent for seen in self.seen if re.search(pattern, seen.path))

    def requests(self, pattern: str) -> list[Seen]:
        return [seen for seen in self.seen if re.search(pattern, seen.path)]

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None

    def described(self, repository: str, path: str) -> bytes:
        return self.listed.get(path, self.repositories[repository][path])


def is_lfs(path: str) -> bool:
    return not path.endswith(".json")


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    file_host = ""
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.record = Seen(
            "files" if not self.file_host else "hub", self.command, path,
            self.headers.get("Range", ""), self.headers.get("Authorization", ""),
        )  # fmt: skip
        self.hub.seen.append(self.record)
        fault = self.hub.fault(f"{self.record.host}{path}")
        if fault and fault.status:
            return self.send(fault.status, fault.body, fault.headers)
        if not self.file_host:
            return self.send_file(*self.find(path.removeprefix("/files/")), fault)
        found = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        if found:
            return self.describe(found[1], found[2] or "main")
        found = re.fullmatch(r"/(.+?)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path)
        if found is None:
            return self.send(404, b"", {})
        return self.resolve(*found.groups(), fault)

    def describe(self, name: str, revision: str) -> None:
        if name not in self.hub.repositories:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in self.hub.refs:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path in self.hub.repositories[name]:
            content = self.hub.described(name, path)
            digest = hashlib.sha256(content).hexdigest()
            item = {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if is_lfs(path):
                item["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(item)
        body = {"id": name, "modelId": name, "sha": self.hub.refs[revision], "siblings": siblings, "private": False}
        return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, path: str, fault: Fault | None) -> None:
        if path not in self.hub.repositories.get(name, {}):
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.hub.described(name, path)
        headers = {"X-Repo-Commit": self.hub.refs[revision]}
        if not is_lfs(path):
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.send_file(self.hub.repositories[name][path], headers, fault)
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.file_host}/files/{name}/{path}?signature=secret",
        }
        return self.send(302, b"", headers)

    def find(self, path: str):
        org, name, rest = path.split("/", 2)
        return self.hub.repositories[f"{org}/{name}"][rest], {"ETag": '"x"'}

    def send_file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range)
        status = 200
        if asked and not (fault and fault.ignore_range):
            status, start = 206, int(asked[1])
            stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
            total, content = len(content), content[start:stop]
            shift = fault.shift if fault else 0
            headers = headers | {"Content-Range": f"bytes {start + shift}-{stop - 1 + shift}/{total}"}
        content = content[: len(content) - (fault.missing if fault else 0)] + bytes(fault.extra if fault else 0)
        return self.send(status, content, headers, fault.cut if fault else -1)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int = -1) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body if cut < 0 else body[:cut]
        self.record.sent += len(part)
        self.wfile.write(part)
        if cut >= 0:
            self.close_connection = True


@contextmanager
def serve():
    """The Hub's endpoint and the server behind it."""
    hub = HubServer()
    files = ThreadingHTTPServer(("127.0.0.1", 0), type("Files", (Handler,), {"hub": hub}))
    host = f"http://localhost:{files.server_port}"  # another host by name: huggingface_hub 1.31 looks at that alone
    front = ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (Handler,), {"hub": hub, "file_host": host}))
    servers = (files, front)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{front.server_port}", hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
