"""A web server that speaks the protocol of the Hugging Face hub, for data sets."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Repository:
    """A data set: the files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Replace the files of a branch and return the commit."""
        commit = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def push_folder(self, folder: Path) -> None:
        """Replace the files of ``main`` by those of a folder."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.push({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by name, to be changed at any time.
        requests: method and path of each request received.
        sent: number of bytes of each file that were sent.
        cut: file -> number of bytes after which the connection is cut, until it is removed.
        wrong: file -> what is sent instead.
    """

    url: str
    repositories: dict[str, Repository]
    requests: list[str]
    sent: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, bytes] = field(default_factory=dict)


Answer = tuple[int, bytes, dict[str, str]]  # status, body and headers


def _described(name: str, body: bytes) -> dict[str, object]:
    """Describe a file as the hub does; tar files are stored with Git LFS."""
    blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
    described: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": blob}
    if name.endswith(".tar"):
        described["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return described


def _answer(repositories: Mapping[str, Repository], path: str) -> Answer:
    information = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", path)
    content = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    match = information or content
    repository = repositories.get(match[1]) if match else None
    if match is None or repository is None:  # the hub does not tell whether it is private
        return 401, b"", {"X-Error-Code": "RepoNotFound"}
    commit = repository.branches.get(match[2], match[2])
    files = repository.commits.get(commit)
    if files is None:
        return 404, b"", {"X-Error-Code": "RevisionNotFound"}
    if information:
        siblings = [_described(name, body) for name, body in files.items()]
        values = {"id": match[1], "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return 200, json.dumps(values).encode(), {"Content-Type": "application/json"}
    if repository.gated:
        return 403, b"", {"X-Error-Code": "GatedRepo"}
    if match[3] not in files:
        return 404, b"", {"X-Error-Code": "EntryNotFound"}
    body = files[match[3]]
    tag = f'"{hashlib.sha256(body).hexdigest()}"'
    return 200, body, {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port."""
    hub = Hub("", {}, [])
    repositories, requests = hub.repositories, hub.requests

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {unquote(self.path)}")

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            status, body, headers = _answer(repositories, path)
            file = path.rpartition("/")[2]
            if status == 200:
                body = hub.wrong.get(file, body)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            version = self.headers.get("If-Range")
            if part is not None and status == 200 and version in (None, headers.get("ETag")):
                first, last = int(part[1]), int(part[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, body[first : last + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                body = body[: hub.cut.get(file)]
                hub.sent[file] = hub.sent.get(file, 0) + len(body)
                self.wfile.write(body)
                self.close_connection = file in hub.cut

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield hub
        httpd.shutdown()
        thread.join()
