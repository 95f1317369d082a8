"""Nothing that a hub answers becomes a path of its choice, whichever library asks."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from datamodules.open_source import open_source
from lit_clip.errors import InputError
from lit_clip.models.config import HuggingFaceTokenizerConfig
from lit_clip.models.external_settings import hugging_face_config, timm_hub_model, timm_hub_weights
from lit_clip.models.hf_tokenizer import from_source
from lit_clip.tools import hub_client
from lit_clip.tools.hub_client import checked_commit, checked_relative
from lit_clip.weights import hub as weights_hub
from tests.conftest import ROOT
from tests.fuzz import wire
from tests.helpers.hub import Hub, Repository, running_hub

DOORS: dict[str, Callable[[], object]] = {
    "pairs": lambda: open_source("a/b"),
    "weights": lambda: weights_hub.download("a/b"),
    "timm's settings": lambda: timm_hub_model("hf-hub:a/b"),
    "timm's weights": lambda: timm_hub_weights("hf-hub:a/b"),
    "configuration": lambda: hugging_face_config("a/b"),
    "tokenizer": lambda: from_source(HuggingFaceTokenizerConfig("a/b"), 8, True, 100),
}
UP = "../" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a/b, which is a data set and a model; empty caches, and a file that no answer may replace."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "1/2/3/4/cache"))
    (tmp_path / "work").mkdir()
    (tmp_path / "victim").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    with running_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "1/2/3/4/hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories["a/b"] = Repository()
        names = ("config.json", "tokenizer.json", "model.safetensors", "train.parquet", "tokenizer_config.json")
        server.repositories["a/b"].push(dict.fromkeys(names, b"{}"))
        yield server


def refused(door: str) -> str:
    """Return the one line with which a door refuses."""
    with pytest.raises(InputError) as caught:
        DOORS[door]()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outside(tmp_path: Path) -> list[str]:
    """Return the files that are not in a cache."""
    assert (tmp_path / "victim").read_text() == "mine"
    files = (path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir())
    return [name for name in files if not re.match(r"1/2/3/4/(hub|cache)/|victim$", name)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag"])
@pytest.mark.parametrize("tag", [f"{UP}{UP}created", "/{folder}/created", "..", "a/b", "a\\b", "x" * 300])
def test_an_etag_never_becomes_a_path(hub: Hub, tmp_path: Path, door: str, name: str, tag: str) -> None:
    hub.headers[name] = f'"{tag.format(folder=tmp_path)}"'
    assert "ETag" in refused(door)
    assert outside(tmp_path) == []


MOVED = ("https://127.0.0.1:1/new", "http://127.0.0.1:2/new", "//127.0.0.1:2/new", "//other/new", "http://[::1]:1/new")


def moved(location: str, tags: dict[str, str], status: int = 302) -> None:
    """Have huggingface_hub ask a hub whose files have moved."""
    import huggingface_hub

    def serve(method: str, url: str, _: str) -> wire.Answer:
        file = (("ETag", '"0"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", "2"))
        old = (("Location", location), ("X-Repo-Commit", "0" * 40), *tags.items())
        if "/api/" in url:
            sibling = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}
            values = {"id": "a/b", "sha": "0" * 40, "siblings": [sibling], "private": False, "tags": []}
            listed = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
            return wire.Answer(body=json.dumps(listed if "/tree/" in url else values).encode())
        return wire.Answer(status, old) if method == "HEAD" and "/resolve/" in url else wire.Answer(200, file, b"{}")

    huggingface_hub.set_client_factory(lambda: wire.hub_client(serve))


@pytest.fixture
def own_client() -> Iterator[None]:
    """Restore the client that other tests use."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    yield
    huggingface_hub.set_client_factory(before)


@pytest.mark.parametrize("name", [pytest.param("ETag", marks=pytest.mark.slow), "X-Linked-Etag"])
@pytest.mark.parametrize("location", [*MOVED, "/new", "new", "?new", "", "http://127.0.0.1:1/new"])
def test_an_etag_of_a_redirection_never_becomes_a_path(
    hub: Hub, own_client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, name: str
) -> None:
    """Whether huggingface_hub follows it, or stops there and takes its ETag."""
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    for status in (301, 302, 307, 308, 300, 304):
        moved(location, {"ETag": '"1"', name: f"{'../' * 7}created"}, status)  # into tmp_path
        for door in DOORS.values():
            with suppress(InputError):  # a redirection that is followed leads to a file
                door()
        assert outside(tmp_path) == []


@pytest.mark.parametrize(("location", "blob"), [("/new", "0"), ("https://other/new", "1")])
def test_a_file_that_has_moved_is_downloaded(
    hub: Hub, own_client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, blob: str
) -> None:
    from huggingface_hub import hf_hub_download

    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    moved(location, {"ETag": 'W/"43-a/b+c"' if blob == "0" else '"1"'})  # the web server's own, of a redirection
    hub_client.guard_hub()
    assert Path(hf_hub_download("a/b", "config.json")).read_text() == "{}"
    assert [path.name for path in tmp_path.glob("1/2/3/4/hub/*/blobs/*")] == [blob]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("commit", [f"{UP}{UP}{UP}victim", f"{UP}created", "main", "A" * 40, "0" * 41])
def test_a_commit_of_a_file_is_a_hash(hub: Hub, tmp_path: Path, door: str, commit: str) -> None:
    hub.headers["X-Repo-Commit"] = commit
    assert "is not a hash of 40 digits" in refused(door)
    assert outside(tmp_path) == []


@pytest.mark.parametrize("door", ["pairs", "weights"])
@pytest.mark.parametrize("commit", [f"{UP}{UP}victim", f"{UP}../victim", "../../../../../../victim", "", 5, None, []])
def test_a_commit_of_a_listing_is_a_hash(hub: Hub, tmp_path: Path, door: str, commit: object) -> None:
    hub.described = lambda values: {**values, "sha": commit} if isinstance(values, dict) else values
    hub.headers["X-Repo-Commit"] = "0" * 40
    assert "is not a hash of 40 digits" in refused(door)
    assert outside(tmp_path) == []


@pytest.mark.parametrize("revision", ["../../../../../../created", "..", "/created"])
def test_a_revision_that_a_checkpoint_names_is_no_path(hub: Hub, tmp_path: Path, revision: str) -> None:
    commit = hub.repositories["a/b"].branches["main"]
    hub.repositories["a/b"].branches[revision] = commit
    with pytest.raises(InputError, match="is not a plain one inside its folder"):
        timm_hub_model(f"hf-hub:a/b@{revision}")
    with pytest.raises(InputError, match="is not a hash of 40 digits"):
        open_source("a/b", versions={"a/b": revision})
    assert outside(tmp_path) == []


@pytest.mark.parametrize("door", ["pairs", "weights"])
@pytest.mark.parametrize(
    "name", ["../x.parquet", "../config.json", "/x.parquet", "a\0.parquet", "\ud800.parquet", "a/../../x.parquet"]
)
def test_a_file_name_outside_of_its_folder_is_one_line(hub: Hub, tmp_path: Path, door: str, name: str) -> None:
    name = name.replace(".parquet", ".parquet" if door == "pairs" else "_config.json")

    def described(values: Any) -> Any:
        key = "path" if isinstance(values, list) else "rfilename"
        for each in values if isinstance(values, list) else values["siblings"]:
            each[key] = name
        return values

    hub.described = described
    refused(door)
    assert outside(tmp_path) == []


@pytest.mark.parametrize("door", ["pairs", "weights"])
@pytest.mark.parametrize("values", [None, 5, [], [5], [[]], {"sha": 1}, {"siblings": 5}, {"siblings": [{}]}, "a"])
def test_a_malformed_listing_is_one_line(hub: Hub, door: str, values: object) -> None:
    hub.described = lambda _: values
    assert refused(door).startswith("a/b: ")


def test_a_checksum_of_a_listing_is_none_that_names_another_file(hub: Hub, tmp_path: Path) -> None:
    """A file of Xet is stored under the checksum of the listing, without another look at the server."""

    def described(values: Any) -> Any:
        for each in values if isinstance(values, list) else []:
            each |= {"xetHash": "0" * 64, "lfs": {"oid": f"{UP}{UP}created", "size": 2, "pointerSize": 1}}
        return values

    hub.described = described
    assert "is none" in refused("weights")
    assert outside(tmp_path) == []


def test_the_client_that_a_user_has_set_is_kept(hub: Hub) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    before, made = _http._GLOBAL_CLIENT_FACTORY, []

    def own() -> Any:
        made.append(_http.default_client_factory())
        return made[-1]

    try:
        huggingface_hub.set_client_factory(own)
        hub.headers["ETag"] = '"../x"'
        assert "ETag" in refused("weights")
        assert len(made) == 1
    finally:
        huggingface_hub.set_client_factory(before)


def test_every_use_of_huggingface_hub_is_guarded() -> None:
    uses = re.compile(r"huggingface_hub import|\.from_pretrained\((?!folder)|timm\.create_model\(name")
    found = [
        path
        for package in ("lit_clip", "datamodules", "callbacks")
        for path in (ROOT / package).rglob("*.py")
        if uses.search(path.read_text(encoding="utf-8")) and path.name != "hub_client.py"
    ]
    assert len(found) > 5
    # An upload makes no path; the export's model is in a folder of its own.
    guards = re.compile(r"guard_hub\(\)|with hub_errors\(")  # the latter begins with the former
    assert [path for path in found if not guards.search(path.read_text(encoding="utf-8"))] == [
        path for path in found if path.name in ("publish.py", "export.py", "hugging_face.py")
    ]


@pytest.mark.parametrize("kind", ["deep", "commit", "name", "no list"])
def test_a_damaged_list_of_files_in_the_cache_is_not_used(hub: Hub, tmp_path: Path, kind: str) -> None:
    commit, deep = "0" * 40, "[" * 100_000 + "]" * 100_000
    texts = {
        "deep": deep,
        "commit": json.dumps({"commit": f"{UP}victim", "files": ["train.parquet"]}),
        "name": json.dumps({"commit": commit, "files": ["../train.parquet"]}),
        "no list": json.dumps({"commit": commit, "files": 5}),
    }
    file = tmp_path / f"1/2/3/4/cache/lit-clip/hub/a--b/{commit}.json"
    file.parent.mkdir(parents=True)
    file.write_text(texts[kind])
    with pytest.raises(InputError, match=f"has no revision {commit} on the hub"):
        open_source(f"a/b@{commit}")


def test_names_are_checked_by_their_form() -> None:
    assert checked_commit("0123456789abcdef0123456789abcdef01234567")
    for name in ("a", "a/b.tar", ".gitattributes", "a b/ä.parquet", "a..b"):
        assert checked_relative(name) == name
    wrong = ("", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a\\b", "a\0", "a\n", "\x85", "\ud800")
    for name in (*wrong, "x" * 300, None, 5, b"a"):
        with pytest.raises(InputError, match="is not a plain one inside its folder"):
            checked_relative(name)
