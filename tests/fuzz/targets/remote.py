"""Hostile answers of a hub and of a store."""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
from fsspec.asyn import sync
from hypothesis import strategies as st

from datamodules.open_source import open_source
from datamodules.shards.pairs import ShardOptions
from lit_clip.errors import InputError
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.models.timm_hub import timm_hub_model
from lit_clip.tools.stores import store_of
from lit_clip.weights import hub as weights_hub
from lit_clip.weights.load import check_before_loading
from tests.fuzz.inputs import CANARY, DEEP, Input, Inputs, edited_json, to_json
from tests.fuzz.samples import shard_members, table_images, tar, whole_tables
from tests.fuzz.target import Target
from tests.fuzz.targets.pairs import on_error, read_pairs, whole_parquet
from tests.fuzz.wire import Answer, Connector, Server, hub_client, opener

COMMIT, SHA256 = "0123456789" * 4, "01234567" * 8
BLOB = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's checksum of `{}`
TIMM = {"architecture": "resnet18", "model_args": {"num_classes": 3}, "pretrained_cfg": {"mean": [0, 0, 0]}}
DEEP_DOWN = "1/2/3/4"  # the caches are there, so that a path of many `..` is found in the working folder
DEEPLY = to_json(DEEP)
MOST = 16 << 20  # bytes that are held of an answer, so that an endless one is soon refused
ENDLESS = 400  # megabytes
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
    status, headers, times, cut = (told.get(key) for key in ("status", "headers", "times", "cut"))
    body = told.get("body")
    content = bodies.get(body) if isinstance(body, str) else None
    return Answer(
        status if type(status) is int and 200 <= status < 600 else 200,
        tuple(headers.items()) if isinstance(headers, dict) else (),
        to_json(body) if content is None else content,
        times if type(times) is int and 0 <= times <= ENDLESS else 1,
        cut if type(cut) is int and 0 <= cut < 2**31 else None,
        told.get("packed") is True,
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
            "GET": {"status": 200, "headers": headers, "body": {}, "times": 1, "cut": None, "packed": False},
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


@cache
def store_trees() -> dict[str, Any]:
    """Return the answers of a store to each of those who read it."""
    trees: dict[str, Any] = {}
    for name, body in (
        ("t.csv", "table"),
        ("x.tar", "shard"),
        ("y.tar", "shard"),
        ("shards", "list"),
        ("a.ckpt", "none"),
    ):
        size = len(_bodies()[body])
        headers = {"Content-Length": str(size), "ETag": '"1"', "Accept-Ranges": "bytes", "Content-Type": "text/html"}
        image = {"Content-Length": str(len(_bodies()["image"]))}
        extra = {"times": 1, "cut": None, "packed": False}
        trees[name] = {
            "HEAD": {"status": 200, "headers": headers},
            "GET": {"status": 200, "headers": {**headers, "Content-Encoding": "identity"}, "body": body, **extra},
            "image": {"status": 200, "headers": {**image, "Content-Encoding": ""}, "body": "image", **extra},
        }
    trees["shards"]["shard"] = trees["x.tar"]["GET"]
    trees["y.tar"]["GET"]["status"] = 206
    return trees


@cache
def _bodies() -> dict[str, bytes]:
    return {
        "table": whole_tables()["t.csv"],
        "shard": tar(shard_members()[:15]),
        "list": b'<a href="x.tar">x</a> <a href="../../y.tar">y</a> <a href="http://other/z.tar">z</a>',
        "image": next(iter(table_images().values())),
        "none": b"no checkpoint",
        "zeros": bytes(1 << 20),
    }


def store_inputs() -> Inputs:
    bombs = [
        Input("t.csv", json.dumps(bomb(kind, packed)).encode()) for kind in ("GET", "image") for packed in (True, False)
    ]
    return st.one_of(*[edited_json(store_trees, (*HOSTILE, *_bodies()))] * 20, st.sampled_from(bombs))


def bomb(kind: str, packed: bool) -> dict[str, Any]:
    """Return answers of which one has no end."""
    tree = json.loads(json.dumps(store_trees()["t.csv"]))
    headers = {"Content-Encoding": "gzip"} if packed else {}
    tree[kind] = {"status": 200, "headers": headers, "body": "zeros", "times": ENDLESS, "packed": packed}
    return tree


def _store(tree: dict[str, Any]) -> Server:
    def serve(method: str, url: str, part: str) -> Answer:
        path = url.partition("?")[0]
        kind = "image" if path.endswith(".png") else "shard" if path.endswith("/x.tar") and "shard" in tree else method
        answer = _answer(tree.get(kind), _bodies())
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", part)
        if asked and answer.status == 206:
            answer = answer._replace(body=answer.body[int(asked[1]) : int(asked[2]) + 1], headers=())
        return answer._replace(status=404) if "index" in url else answer

    return serve


def connected(server: Server, options: dict[str, Any] | None = None) -> Any:
    """Return fsspec's store of the web, connected to a server in this process.

    Args:
        server: that answers.
        options: of the session; None: those that lit-clip sets.
    """
    store, _ = store_of("http://host/")
    kept = store.client_kwargs if options is None else options

    async def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=Connector(server), cookie_jar=aiohttp.DummyCookieJar(), **kept)

    store._session = sync(store.loop, session)
    return store


def ask_store(folder: Path, given: Input, options: dict[str, Any] | None = None) -> Iterator[str]:
    """Have a web store answer."""
    store = connected(_store(_read_tree(given.data)), options)
    url, skip = f"http://host/{given.name}", on_error(given)
    shards = ShardOptions(cache_folder=str(folder / "shards"), index_workers=0)
    try:
        with (
            patch("time.sleep"),
            patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")),
            patch("datamodules.loading.store.MAX_IMAGE_BYTES", MOST),
            patch("lit_clip.tools.store_answers.MOST", MOST),
        ):
            if given.name == "a.ckpt":
                check_before_loading(url)
            elif given.name == "shards":
                yield from read_pairs(open_source(f"{url}/", on_error=skip, shards=shards))
            else:
                yield from read_pairs(open_source(url, on_error=skip, shards=shards))
    finally:
        sync(store.loop, store._session.close)


hub = Target(hub_inputs, ask_hub)
store = Target(store_inputs, ask_store)
