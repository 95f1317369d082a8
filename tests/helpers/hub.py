"""A web server that speaks the protocol of the Hugging Face hub, for data sets."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by name, to be changed at any time.
        requests: method and path of each request received.
    """

    url: str
    repositories: dict[str, Repository]
    requests: list[str]


Answer = tuple[int, bytes, dict[str, str]]  # status, body and headers


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
        siblings = [{"rfilename": name} for name in files]
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
    repositories: dict[str, Repository] = {}
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {unquote(self.path)}")

        def do_GET(self) -> None:
            status, body, headers = _answer(repositories, unquote(self.path.partition("?")[0]))
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if part is not None and status == 200:
                first, last = int(part[1]), int(part[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, body[first : last + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield Hub(f"http://127.0.0.1:{httpd.server_address[1]}", repositories, requests)
        httpd.shutdown()
        thread.join()
