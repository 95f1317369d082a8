"""A web server that speaks the protocol of the Hugging Face hub: downloads, and uploads of models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml


@dataclass
class Repository:
    """A data set or model: the files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

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
        writers: token -> the organizations in which it may write.
        stored: content uploaded with Git LFS, by SHA-256.
        on_upload: called when such content arrives, before it is stored.
        headers: sent with every file, in place of the hub's own.
        described: changes a description or a list of files before it is sent.
    """

    url: str
    repositories: dict[str, Repository]
    requests: list[str]
    sent: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, bytes] = field(default_factory=dict)
    writers: dict[str, set[str]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    on_upload: Callable[[], None] = lambda: None
    headers: dict[str, str] = field(default_factory=dict)
    described: Callable[[Any], Any] = lambda values: values


Answer = tuple[int, bytes, dict[str, str]]  # status, body and headers


LFS = (".tar", ".safetensors", ".onnx")  # ends of the names of files that are stored with Git LFS


def _described(name: str, body: bytes) -> dict[str, object]:
    """Describe a file as the hub does."""
    blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
    described: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": blob}
    if name.endswith(LFS):
        described["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return described


def _in_tree(name: str, body: bytes) -> dict[str, object]:
    """Describe a file as the hub does in a listing of folders."""
    described = _described(name, body)
    entry = {"type": "file", "path": name, "size": len(body), "oid": described["blobId"]}
    lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry | ({"lfs": lfs} if "lfs" in described else {})


def _json(values: object, status: int = 200) -> Answer:
    return status, json.dumps(values).encode(), {"Content-Type": "application/json"}


def _answer(repositories: Mapping[str, Repository], path: str) -> Answer:
    information = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?", path)
    tree = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/([^/]+)", path)
    content = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    match = information or tree or content
    repository = repositories.get(match[1]) if match else None
    if match is None or repository is None:  # the hub does not tell whether it is private
        return 401, b"", {"X-Error-Code": "RepoNotFound"}
    commit = repository.branches.get(match[2] or "main", match[2])
    files = repository.commits.get(commit)
    if files is None:
        return 404, b"", {"X-Error-Code": "RevisionNotFound"}
    if information:
        siblings = [_described(name, body) for name, body in files.items()]
        values = {"id": match[1], "sha": commit, "siblings": siblings, "private": repository.private, "tags": []}
        return _json(values)
    if tree:
        return _json([_in_tree(name, body) for name, body in files.items()])
    if repository.gated:
        return 403, b"", {"X-Error-Code": "GatedRepo"}
    if match[3] not in files:
        return 404, b"", {"X-Error-Code": "EntryNotFound"}
    body = files[match[3]]
    tag = f'"{hashlib.sha256(body).hexdigest()}"'
    return 200, body, {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}


def _as_told(hub: Hub, path: str, status: int, body: bytes, headers: dict[str, str]) -> Answer:
    """Return the answer with what the test wants to be different."""
    if status == 200:
        body = hub.wrong.get(path.rpartition("/")[2], body)
    if path.startswith("/api/") and status == 200:
        body = json.dumps(hub.described(json.loads(body))).encode()
    return status, body, headers | (hub.headers if "/resolve/" in path else {})


def _received(hub: Hub, path: str, body: bytes, token: str) -> Answer:
    """Answer a POST or PUT as the hub does when a model is uploaded."""
    if path.startswith("/storage/"):
        hub.on_upload()
        hub.stored[hashlib.sha256(body).hexdigest()] = body
        return 200, b"", {}
    if path == "/api/validate-yaml":
        return _validated(json.loads(body)["content"])
    values = {} if path.endswith("/commit/main") else json.loads(body)
    create = path == "/api/repos/create"
    found = re.match(r"/(?:api/models/)?([^/]+)/([^/.]+)", path)
    organization, name = (values["organization"], values["name"]) if create or not found else found.groups()
    name = f"{organization}/{name}"
    if token not in hub.writers:
        return 401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"}
    if organization not in hub.writers[token]:
        return 403, b"", {"X-Error-Message": "You do not have the rights"}
    if create:
        if name in hub.repositories:
            return _json({"error": "You already created this model repo"}, 409)
        hub.repositories[name] = Repository(private=values.get("visibility") == "private")
        hub.repositories[name].push({".gitattributes": b"*.safetensors filter=lfs"})
        return _json({"url": f"{hub.url}/{name}"})
    if path.endswith("/preupload/main"):
        modes = [("lfs" if file["path"].endswith(LFS) else "regular", file["path"]) for file in values["files"]]
        return _json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for mode, p in modes]})
    if path.endswith(".git/info/lfs/objects/batch"):
        uploads = {
            oid: {"upload": {"href": f"{hub.url}/storage/{oid}"}} for oid in (o["oid"] for o in values["objects"])
        }
        return _json({"objects": [{"oid": oid, "size": 1, "actions": actions} for oid, actions in uploads.items()]})
    return _committed(hub, name, [json.loads(line) for line in body.splitlines()])


def _committed(hub: Hub, name: str, operations: list[dict[str, Any]]) -> Answer:
    repository = hub.repositories[name]
    files, (header, *added) = dict(repository.commits[repository.branches["main"]]), operations
    if header["value"].get("parentCommit", repository.branches["main"]) != repository.branches["main"]:
        return _json({"error": "A commit has happened since."}, 412)
    for each in added:
        value = each["value"]
        files[value["path"]] = (
            hub.stored[value["oid"]] if each["key"] == "lfsFile" else base64.b64decode(value["content"])
        )
    commit = repository.push(files)
    return _json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})


def _validated(card: str) -> Answer:
    """Check a card's front matter, as far as the hub does for what lit-clip writes."""
    front = yaml.safe_load(card.split("---\n")[1])
    wrong = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(front.get(key, ""), str)]
    if front.get("license") not in (None, "mit", "apache-2.0", "other"):
        wrong.append('"license" must be one of [apache-2.0, mit, ...]')
    return _json({"errors": [{"message": each} for each in wrong], "warnings": []}, 400 if wrong else 200)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port."""
    hub = Hub("", {}, [])
    repositories, requests = hub.repositories, hub.requests

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {unquote(self.path)}")

        def head(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            status, body, headers = _as_told(hub, path, *_answer(repositories, path))
            file = path.rpartition("/")[2]
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            version = self.headers.get("If-Range")
            if part is not None and status == 200 and version in (None, headers.get("ETag")):
                first, last = int(part[1]), int(part[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, body[first : last + 1]
            self.head(status, body, headers)
            if self.command == "GET":
                body = body[: hub.cut.get(file)]
                hub.sent[file] = hub.sent.get(file, 0) + len(body)
                self.wfile.write(body)
                self.close_connection = file in hub.cut

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, body, headers = _received(hub, unquote(self.path), body, token)
            self.head(status, body, headers)
            self.wfile.write(body)

        do_PUT = do_POST

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield hub
        httpd.shutdown()
        thread.join()


def command_with_hub(url: str) -> None:
    """Run ``lit-clip`` in a fork with the hub at a URL, whose variable has been read already."""
    from huggingface_hub import constants

    from tests.helpers import forks

    constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    forks.command()
