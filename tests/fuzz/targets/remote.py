"""Hostile answers of a hub."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datamodules.open_source import open_source
from lit_clip.errors import InputError
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.models.external_settings import timm_hub_model
from lit_clip.weights import hub as weights_hub
from tests.fuzz.inputs import CANARY, DEEP, Input, Inputs, Target, edited_json, to_json
from tests.fuzz.targets.pairs import on_error, read_pairs, whole_parquet
from tests.fuzz.wire import Answer, Server, hub_client, opener

COMMIT, SHA256 = "0123456789" * 4, "01234567" * 8
BLOB = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's checksum of `{}`
TIMM = {"architecture": "resnet18", "model_args": {"num_classes": 3}, "pretrained_cfg": {"mean": [0, 0, 0]}}
DEEP_DOWN = "1/2/3/4"  # the caches are there, so that a path of many `..` is found in the working folder
DEEPLY = to_json(DEEP)
MOVED = {  # where a file that is asked for has moved to
    "moved": "/again",
    "moved-scheme": "http://hub/again",
    "moved-port": "https://hub:1/again",
    "moved-host": "https://other/again",
}
HOSTILE = (
    *("../" * 4 + "created", "../" * 7 + "created", "/tmp/created", "..", "a/../../b", "a\\..\\b", "a\0b", "x" * 3000),
    *(
        f'"{"../" * 7}created"',
        'W/".."',
        '"a/b"',
        COMMIT,
        COMMIT.upper(),
        f"{COMMIT}0",
        SHA256,
        "train.parquet",
        "x.tar",
    ),
    *("gzip", "gzip, gzip", "br", "identity", "chunked", "bytes 0-9/10", "bytes */*", "none", 404, 403, 416, 206, 302),
    *(
        "http://other/x",
        "//other/x",
        "file:///etc/passwd",
        "/again",
        "https://hub/",
        "http://hub/again",
        "https://hub:1/again",
        -5,
        10**12,
        "RepoNotFound",
    ),
)


def _answer(tree: Any, bodies: dict[str, bytes]) -> Answer:
    """Return the answer that a tree describes, as far as it can be sent."""
    told = tree if isinstance(tree, dict) else {}
    status, headers, cut = (told.get(key) for key in ("status", "headers", "cut"))
    body = told.get("body")
    content = bodies.get(body) if isinstance(body, str) else None
    return Answer(
        status if type(status) is int and 200 <= status < 600 else 200,
        tuple(headers.items()) if isinstance(headers, dict) else (),
        to_json(body) if content is None else content,
        cut if type(cut) is int and 0 <= cut < 2**31 else None,
    )


def _read_tree(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data.replace(DEEPLY, json.dumps(DEEP).encode()))  # an answer is made deep again
    except ValueError:  # a key that was made a list
        return {}
    return tree if isinstance(tree, dict) else {}


@cache
def hub_trees() -> dict[str, Any]:
    """Return the answers of a hub to each of those who ask it."""
    names = {"pairs": "train.parquet", "weights": "model.safetensors", "timm": "config.json", "download": "test/0.tar"}
    names |= dict.fromkeys(MOVED, "model.safetensors")
    trees: dict[str, Any] = {}
    for door, name in names.items():
        files = [{"rfilename": each, "size": 2, "blobId": BLOB} for each in (name, "config.json")]
        listed: list[dict[str, Any]] = [
            {"type": "file", "path": each, "size": 2, "oid": BLOB} for each in (name, "config.json")
        ]
        listed[0] |= {"lfs": {"oid": SHA256, "size": 2, "pointerSize": 134}, "xetHash": SHA256}
        headers = {"ETag": f'"{SHA256}"', "X-Repo-Commit": COMMIT, "Content-Length": "2"}
        info = {"id": f"org/{door}", "sha": COMMIT, "siblings": files, "private": False, "tags": []}
        trees[door] = {
            "info": {"status": 200, "headers": {"Content-Type": "application/json"}, "body": info},
            "tree": {"status": 200, "headers": {"Link": '<https://hub/next>; rel="x"'}, "body": listed},
            "HEAD": {"status": 200, "headers": {**headers, "X-Linked-Etag": f'"{SHA256}"', "X-Error-Code": ""}},
            "GET": {"status": 200, "headers": headers, "body": {}, "cut": None},
        }
        if door in MOVED:
            trees[door]["moved"] = {"status": 302, "headers": {**headers, "Location": MOVED[door]}}
        contents = {"pairs": "pairs", "timm": TIMM}
        if door in contents:
            trees[door]["GET"]["body"] = contents[door]
            size = len(whole_parquet()["inside.parquet"] if door == "pairs" else json.dumps(TIMM))
            for method in ("HEAD", "GET"):
                trees[door][method]["headers"] = {**trees[door][method]["headers"], "Content-Length": str(size)}
    return trees


def hub_inputs() -> Inputs:
    return edited_json(hub_trees, HOSTILE)


def _hub(tree: dict[str, Any]) -> Server:
    bodies = {"pairs": whole_parquet()["inside.parquet"], "zeros": bytes(1 << 20)}

    def serve(method: str, url: str, _: str) -> Answer:
        kind = "tree" if "/tree/" in url else "info" if "/api/" in url else method
        if kind == "HEAD" and "/resolve/" in url and "moved" in tree:
            kind = "moved"
        return _answer(tree.get(kind), bodies)

    return serve


def _download(folder: Path) -> Iterator[str]:
    data = {"class_path": "datamodules.evaluation.WebDataset", "init_args": {"root": "wds"}}
    entry = SuiteEntry(data, download=[{"hub": "org/download"}])
    for reason in download_missing({"set": entry}, folder / "data").values():
        raise InputError(reason)
    yield "used"


def _use_weights(name: str) -> Iterator[str]:
    assert weights_hub.download(f"org/{name}").is_dir()
    yield "used"


def _use_timm() -> Iterator[str]:
    timm_hub_model("hf-hub:org/timm")
    yield "used"


def ask_hub(folder: Path, given: Input) -> Iterator[str]:
    """Have a hub answer; no file may appear but in the caches, where each has a name of this library's."""
    import huggingface_hub
    from huggingface_hub import _tree_cache, constants

    server, down = _hub(_read_tree(given.data)), folder / DEEP_DOWN
    down.mkdir(parents=True)
    doors: dict[str, Callable[[], Iterator[str]]] = {
        "pairs": lambda: read_pairs(open_source("org/pairs", on_error=on_error(given))),
        **{name: partial(_use_weights, name) for name in ("weights", *MOVED)},
        "timm": _use_timm,
        "download": lambda: _download(down),
    }
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    with (
        patch.dict(os.environ, XDG_CACHE_HOME=str(down / "cache")),
        patch.multiple(constants, HF_HUB_CACHE=str(down / "hub"), ENDPOINT="https://hub", HF_HUB_DISABLE_XET=True),
        patch.multiple(constants, HF_TOKEN_PATH=str(down / "token"), HF_STORED_TOKENS_PATH=str(down / "tokens")),
        patch.object(constants, "AGENT_HARNESSES_PATH", str(down / "hub.agents")),
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "https://hub/{repo_id}/resolve/{revision}/{filename}"),
        patch("urllib.request.urlopen", opener(server)),
        patch("time.sleep"),
    ):
        huggingface_hub.set_client_factory(lambda: hub_client(server))
        try:
            yield from doors[given.name]()
        finally:
            _check_files(folder)


def _check_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = path.is_dir() or name == f"{CANARY}.py" or name.startswith(tuple(f"{DEEP_DOWN}/{top}" for top in TOPS))
        assert known, f"{name} was created"
    for path in folder.glob(f"{DEEP_DOWN}/hub/*/*"):
        assert path.name in ("blobs", "snapshots", "refs", "trees", ".no_exist") or ".locks" in path.parts, (
            f"{path.name}"
        )


TOPS = ("hub/", "cache/", "data/", "data.", "hub.")


hub = Target(hub_inputs, ask_hub)
