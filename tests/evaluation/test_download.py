"""Downloads of evaluation sets: from a server that speaks the hub's protocol, and of torchvision's archives."""

import hashlib
import io
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torchvision

from datamodules import evaluation as sets
from lit_clip.errors import InputError
from lit_clip.evaluation import download
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.suite import SuiteEntry, Task, read_suite
from tests.conftest import ROOT
from tests.helpers.coloured_sets import WDS_LABELS, WDS_NAMES, WDS_TEMPLATES, wds_sample, write_wds
from tests.helpers.hub import Hub, Repository, running_hub
from tests.helpers.miniatures import MINIATURES

NAME = "clip-benchmark/wds_mnist"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a set of tar files, which has a training split too."""
    folder = tmp_path / "published"
    samples = [wds_sample(number, cls=str(label).encode()) for number, label in enumerate(WDS_LABELS)]
    write_wds(folder, samples, WDS_NAMES, WDS_TEMPLATES)
    shutil.copytree(folder / "test", folder / "train")
    (folder / ".gitattributes").write_text("*.tar filter=lfs")
    with running_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories[NAME] = Repository()
        server.repositories[NAME].push_folder(folder)
        yield server


@pytest.fixture
def wds() -> SuiteEntry:
    data = {"class_path": "datamodules.evaluation.WebDataset", "init_args": {"root": "wds_mnist"}}
    return SuiteEntry(data, download=[{"hub": NAME}])


def gets(hub: Hub) -> list[str]:
    return [
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "resolve" in request
    ]


def test_missing_set_of_the_hub_is_downloaded_with_the_splits_that_are_wanted(
    hub: Hub, wds: SuiteEntry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert download_missing({"digits": wds, "again": wds}, data) == {}
    opened, published = wds.open("test", 0, data), sets.WebDataset(str(tmp_path / "published"))
    assert isinstance(opened, sets.WebDataset)
    assert [opened[i][0].tobytes() for i in range(len(opened))] == [image.tobytes() for image, _ in published]
    assert opened.labels() == published.labels()
    files = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    names = ["classnames.txt", "zeroshot_classification_templates.txt", "test/0.tar", "test/1.tar", "test/nshards.txt"]
    assert files == {f"wds_mnist/{name}" for name in names}  # no train, and nothing of the transfer
    total = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    assert f"digits: downloading {total / 1e3:.3g} kB into {data / 'wds_mnist'}" in capsys.readouterr().err
    assert sorted(gets(hub)) == sorted(Path(name).name for name in names)
    hub.requests.clear()
    assert download_missing({"digits": wds}, data) == {}
    assert hub.requests == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rfilename": "test/\0.tar"}, "is not a plain one inside its folder"),
        ({"rfilename": "test/\ud800.tar"}, "is not a plain one inside its folder"),
        ({"rfilename": "test/../../x.tar"}, "is not a plain one inside its folder"),
        ({"rfilename": f"test/{'x' * 300}.tar"}, "is not a plain one inside its folder"),
        ({"size": [1]}, "cannot be downloaded from the hub"),
        ({"rfilename": 5}, "cannot be downloaded from the hub"),
        ({"lfs": 5}, "cannot be downloaded from the hub"),
    ],
)
def test_hostile_listing_is_one_line(
    hub: Hub, wds: SuiteEntry, tmp_path: Path, values: dict[str, Any], problem: str
) -> None:
    hub.described = lambda listing: {**listing, "siblings": [{**each, **values} for each in listing["siblings"]]}
    reason = download_missing({"digits": wds}, tmp_path / "data")["digits"]
    assert re.fullmatch(f"{NAME}: .*{problem}.*", reason)
    assert list((tmp_path / "data").rglob("*")) == []


@pytest.mark.parametrize("commit", ["../../../x", None, 5, "main"])
def test_hostile_commit_is_one_line(hub: Hub, wds: SuiteEntry, tmp_path: Path, commit: object) -> None:
    hub.described = lambda listing: {**listing, "sha": commit}
    assert "is not a hash of 40 digits" in download_missing({"digits": wds}, tmp_path / "data")["digits"]


def with_splits(wds: SuiteEntry, **splits: dict[str, Any]) -> SuiteEntry:
    return SuiteEntry(wds.data, {"test": {}, **splits}, download=wds.download)


def test_only_what_is_missing_is_downloaded(hub: Hub, wds: SuiteEntry, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert download_missing({"digits": wds}, data) == {}
    hub.requests.clear()
    (data / "wds_mnist/classnames.txt").write_text("my own")
    assert download_missing({"digits": with_splits(wds, train={"split": "train"})}, data) == {}
    assert sorted(gets(hub)) == ["0.tar", "1.tar", "nshards.txt"]
    assert (data / "wds_mnist/classnames.txt").read_text() == "my own"
    for name in ("0.tar", "1.tar", "nshards.txt"):
        assert (data / "wds_mnist/train" / name).read_bytes() == (tmp_path / "published/train" / name).read_bytes()


def test_split_that_the_hub_does_not_have_is_no_reason_to_download_the_others_again(
    hub: Hub, wds: SuiteEntry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = with_splits(wds, train={"split": "validation"})
    assert download_missing({"digits": entry}, tmp_path / "data") == {}
    assert gets(hub)
    hub.requests.clear()
    capsys.readouterr()
    assert download_missing({"digits": entry}, tmp_path / "data") == {}
    assert gets(hub) == []
    assert capsys.readouterr().err == ""


def test_another_sets_split_is_not_a_reason_to_download_this_set(hub: Hub, wds: SuiteEntry, tmp_path: Path) -> None:
    assert download_missing({"digits": wds}, tmp_path / "data") == {}
    hub.requests.clear()
    other = {"class_path": "datamodules.evaluation.WebDataset", "init_args": {"root": "imagenet", "split": "train"}}
    assert download_missing({"digits": with_splits(wds, train=other)}, tmp_path / "data") == {}
    assert hub.requests == []
    shutil.rmtree(tmp_path / "data/wds_mnist")
    assert download_missing({"digits": with_splits(wds, train=other)}, tmp_path / "data") == {}
    assert not (tmp_path / "data/wds_mnist/train").exists()


def test_interrupted_transfer_resumes_where_it_ended(
    hub: Hub, wds: SuiteEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut["1.tar"] = 3000
    reason = download_missing({"digits": wds}, tmp_path / "data")["digits"]
    assert re.fullmatch(r"digits: cannot be downloaded \(.+\); run the same command again to resume", reason)
    assert not (tmp_path / "data/wds_mnist").exists()
    hub.cut.clear()
    hub.requests.clear()
    assert download_missing({"digits": wds}, tmp_path / "data") == {}
    assert gets(hub) == ["1.tar"]
    assert (tmp_path / "data/wds_mnist/test/1.tar").read_bytes() == (tmp_path / "published/test/1.tar").read_bytes()


def test_second_process_waits_and_downloads_nothing_again(
    hub: Hub, wds: SuiteEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock is of an open file, so that threads stand for processes."""
    almost_done, go_on, fetch = Event(), Event(), download._fetch

    def slowly(*arguments: Any) -> None:
        fetch(*arguments)
        almost_done.set()
        assert go_on.wait(20)

    (tmp_path / "data").mkdir()
    (tmp_path / "data/.wds_mnist.download.lock").touch()  # a killed process has left it
    monkeypatch.setattr(download, "_fetch", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download_missing, {"digits": wds}, tmp_path / "data")
        assert almost_done.wait(20)
        almost_done.clear()
        second = pool.submit(download_missing, {"same": wds}, tmp_path / "data")
        said, end = "", time.monotonic() + 10
        while "same: waiting for another process that downloads into" not in said and time.monotonic() < end:
            said += capsys.readouterr().err
            time.sleep(0.01)
        waited = not almost_done.is_set()
        go_on.set()
        assert (first.result(20), second.result(20)) == ({}, {})
    assert "same: waiting for another process that downloads into" in said
    assert waited
    assert len(gets(hub)) == len(set(gets(hub))) == 5
    assert len(keys(wds, tmp_path / "data")) == len(WDS_LABELS)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["wds_mnist"]


@pytest.mark.parametrize("name", ["1.tar", "classnames.txt"])
def test_wrong_checksum_is_refused(name: str, hub: Hub, wds: SuiteEntry, tmp_path: Path) -> None:
    """Of files in Git LFS it is SHA-256, of the others git's."""
    (path,) = [path for path in (tmp_path / "published").rglob(name) if path.parent.name != "train"]
    hub.wrong[name] = bytes(len(path.read_bytes()))
    reason = download_missing({"digits": wds}, tmp_path / "data")["digits"]
    assert name in reason
    assert "checksum" in reason
    assert not (tmp_path / "data/wds_mnist").exists()
    del hub.wrong[name]
    assert download_missing({"digits": wds}, tmp_path / "data") == {}
    assert (tmp_path / "data/wds_mnist").is_dir()


def test_set_that_the_hub_does_not_have_is_named_and_the_others_are_downloaded(
    hub: Hub, wds: SuiteEntry, tmp_path: Path
) -> None:
    data = {"class_path": "datamodules.evaluation.WebDataset", "init_args": {"root": "gone"}}
    gone = SuiteEntry(data, download=[{"hub": "clip-benchmark/gone"}])
    failed = download_missing({"gone": gone, "digits": wds}, tmp_path / "data")
    assert list(failed) == ["gone"]
    assert "clip-benchmark/gone: cannot be downloaded from the hub" in failed["gone"]
    assert (tmp_path / "data/wds_mnist").is_dir()


@pytest.fixture
def dtd(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuiteEntry:
    """DTD's miniature in an archive, which torchvision's class gets from the server."""
    MINIATURES["dtd"].write(tmp_path / "miniature")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(tmp_path / "miniature/dtd/dtd", "dtd")
    hub.repositories["any/archives"] = Repository()
    hub.repositories["any/archives"].push({"dtd.tar.gz": file.getvalue()})
    url = f"{hub.url}/datasets/any/archives/resolve/main/dtd.tar.gz"
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", url)
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", hashlib.md5(file.getvalue()).hexdigest())
    data = {"class_path": "datamodules.evaluation.DTD", "init_args": {"root": "dtd"}}
    return SuiteEntry(data, {"train": {"split": "train"}, "test": {}}, download=[{"torchvision": "DTD"}])


def keys(entry: SuiteEntry, root: Path) -> list[str]:
    images = entry.open("test", 0, root)
    return [images.key(i) for i in range(len(images))]


def test_torchvisions_set_is_downloaded_unpacked_and_its_archive_removed(
    hub: Hub, dtd: SuiteEntry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download_missing({"textures": dtd}, tmp_path / "data") == {}
    expected = sets.DTD(str(tmp_path / "miniature"))
    assert keys(dtd, tmp_path / "data") == [expected.key(i) for i in range(len(expected))]
    assert sorted(path.name for path in (tmp_path / "data/dtd/dtd").iterdir()) == ["dtd"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["dtd"]
    assert "textures: downloading torchvision's DTD into" in capsys.readouterr().err


def test_interrupted_unpacking_starts_again(
    hub: Hub, dtd: SuiteEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision takes a folder that is half unpacked for the whole set."""

    def interrupted(tar: tarfile.TarFile, path: str) -> None:
        tar.extract("dtd/labels/test1.txt", path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_missing({"textures": dtd}, tmp_path / "data")
    assert not (tmp_path / "data/dtd").exists()
    assert list((tmp_path / "data").rglob("test1.txt"))
    assert download_missing({"textures": dtd}, tmp_path / "data") == {}
    assert len(keys(dtd, tmp_path / "data")) == 2


def test_torchvisions_checksum_is_compared(hub: Hub, dtd: SuiteEntry, tmp_path: Path) -> None:
    hub.wrong["dtd.tar.gz"] = b"<html>404: not found</html>"
    reason = download_missing({"textures": dtd}, tmp_path / "data")["textures"]
    assert "File not found or corrupted" in reason
    assert not (tmp_path / "data/dtd").exists()


def test_torchvisions_split_that_no_task_uses_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = read_suite(ROOT / "configs/evaluation/paper.yaml")["gtsrb"]
    cases: list[tuple[list[Task], list[str]]] = [(["zero_shot"], ["test"]), (["linear_probe"], ["train", "test"])]
    for tasks, splits in cases:
        unpacked: list[str] = []
        monkeypatch.setattr(download, "_unpack", lambda source, _, found=unpacked: found.append(source["split"]))
        download_missing({"signs": entry}, tmp_path, tasks)
        assert unpacked == splits


def test_sets_in_one_folder_are_tried_once_if_they_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, tried = read_suite(ROOT / "configs/evaluation/paper.yaml"), list[str]()

    def no_space(source: Mapping[str, Any], _: Path) -> None:
        tried.append(source["torchvision"])
        raise OSError("no space left")

    monkeypatch.setattr(download, "_unpack", no_space)
    failed = download_missing({name: suite[name] for name in ("sun397", "sun", "dtd")}, tmp_path)
    assert tried == ["SUN397", "DTD"]
    assert failed["sun"] == failed["sun397"] != failed["dtd"]


def test_archive_that_cannot_be_unpacked_is_downloaded_again(
    hub: Hub, dtd: SuiteEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FGVC-Aircraft's, which has no checksum, if a network's login page comes instead."""
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", None)
    hub.wrong["dtd.tar.gz"] = b"<html>log in</html>"
    reason = download_missing({"textures": dtd}, tmp_path / "data")["textures"]
    assert "not a gzip file" in reason
    hub.wrong.clear()
    assert download_missing({"textures": dtd}, tmp_path / "data") == {}
    assert len(keys(dtd, tmp_path / "data")) == 2


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_archive_with_members_outside_of_the_folder_is_refused(
    kind: bytes, hub: Hub, dtd: SuiteEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo("../../../escaped.txt" if kind == tarfile.REGTYPE else "link")
        member.type, member.linkname = kind, "../../../.."
        tar.addfile(member)
    hub.repositories["any/archives"].push({"dtd.tar.gz": file.getvalue()})
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", hashlib.md5(file.getvalue()).hexdigest())
    reason = download_missing({"textures": dtd}, tmp_path / "data")["textures"]
    assert "outside the destination" in reason
    assert [path for name in ("escaped.txt", "link") for path in tmp_path.rglob(name)] == []


def test_torchvisions_set_that_is_there_is_not_downloaded_for_what_else_is_missing(
    hub: Hub, dtd: SuiteEntry, tmp_path: Path
) -> None:
    """Such as SUN397, whose lists of images have to be had elsewhere."""
    assert download_missing({"textures": dtd}, tmp_path / "data") == {}
    hub.requests.clear()
    data = {"class_path": "datamodules.evaluation.COCO", "init_args": {"root": "dtd"}}
    lacking = SuiteEntry(data, metric="recall@1", download=[{"torchvision": "DTD"}])
    assert download_missing({"lacking": lacking}, tmp_path / "data") == {}
    assert hub.requests == []


@pytest.mark.parametrize(
    "source", [{"torchvision": "DTD", "hub": NAME}, {"hub": NAME, "split": "test"}, {"url": "x"}, {"hub": 3}]
)
def test_unknown_source_is_an_error(source: dict[str, Any]) -> None:
    data = {"class_path": "datamodules.evaluation.DTD", "init_args": {"root": "dtd"}}
    with pytest.raises(InputError, match="must be {torchvision: NAME, ...} or {hub: OWNER/NAME}"):
        SuiteEntry(data, download=[source])


def test_unknown_class_of_torchvisions_is_an_error(tmp_path: Path) -> None:
    data = {"class_path": "datamodules.evaluation.DTD", "init_args": {"root": "dtd"}}
    entry = SuiteEntry(data, download=[{"torchvision": "Textures"}])
    failed = download_missing({"textures": entry}, tmp_path)
    assert failed == {"textures": "download: torchvision.datasets has no Textures"}
