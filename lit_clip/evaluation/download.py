"""Download the sets of a suite that torchvision or the Hugging Face hub has.

Interrupted transfers resume; files are compared with their sizes and checksums. Torchvision unpacks its own archives.
All this happens in a hidden folder beside the set's, whose content is moved there when it is complete: at once if the
set's folder is new, else file by file. Processes that would download into the same folder wait for each other.
"""

import errno
import importlib
import os
import shutil
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task
from lit_clip.evaluation.tasks import used_splits
from lit_clip.tools.atomic import make_folder, not_written
from lit_clip.tools.console import size_in_bytes, stderr
from lit_clip.tools.hashing import hash64
from lit_clip.tools.hub_client import guard_hub
from lit_clip.tools.reading import first_line, naming
from lit_clip.tools.remote_names import checked_commit, checked_path
from lit_clip.tools.transfers import RemoteFile, part_of, size_on_server, transfer
from lit_clip.tools.untrusted import shortened


@dataclass
class _Plan:
    """What a folder lacks: of a suite's sets in it, files of the hub and sets of torchvision."""

    root: Path
    names: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)  # subfolders wanted of a data set of the hub
    files: list[RemoteFile] = field(default_factory=list)

    @property
    def title(self) -> str:
        return ", ".join(self.names)

    @property
    def stage(self) -> Path:
        return self.root.with_name(f".{self.root.name}.download")

    @property
    def content(self) -> Path:
        return self.stage / "content"

    @property
    def of_torchvision(self) -> list[dict[str, Any]]:
        return [source for source in self.sources if "torchvision" in source]

    def kept(self, file: RemoteFile) -> Path:
        """Return where a file is kept until the set is complete."""
        return self.stage / "transfers" / f"{hash64(file.url).hex()}-{Path(file.name).name}"

    def lacks(self, file: RemoteFile) -> bool:
        return not (self.root / file.name).exists()

    def size(self) -> int:
        """Return how many bytes of files of the hub are still to be transferred."""
        files = [file for file in self.files if file.size is not None]
        kept = [path for file in files for path in (self.kept(file), part_of(self.kept(file)))]
        have = sum(path.stat().st_size for path in kept if path.exists())
        return max(0, sum(file.size or 0 for file in files) - have)


def download_missing(
    entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task] = TASKS
) -> dict[str, str]:
    """Download the missing sets of a suite that have a ``download``; return the failures, by set.

    Splits that none of the ``tasks`` uses, and splits of another set, are not downloaded for a set.
    """
    make_folder(data_root, "--data_root")
    failed: dict[str, str] = {}
    plans: list[_Plan] = []
    for plan in _plans(entries, data_root, tasks):
        try:
            plan.files = [file for source in plan.sources if "hub" in source for file in _of_hub(plan, source["hub"])]
            plans += [plan] if plan.files or plan.of_torchvision else []
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
    free = left = shutil.disk_usage(data_root).free
    fitting: list[_Plan] = []
    for plan in plans:
        if plan.size() <= left:
            fitting.append(plan)
            left -= plan.size()
    if fitting:
        amounts = {plan.title: _amount(plan.size(), bool(plan.of_torchvision)) for plan in fitting}
        total = _amount(sum(map(_Plan.size, fitting)), any(plan.of_torchvision for plan in fitting))
        lines = [f"  {title}: {amount}" for title, amount in amounts.items()]
        stderr().print(f"downloading {total} into {data_root}:\n" + "\n".join(lines))
    for plan in plans:
        try:
            size, space = size_in_bytes(plan.size()), size_in_bytes(free)
            require(plan in fitting, f"--data_root {data_root}: {size} do not fit; {space} are free for all sets")
            _download(plan)
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
            stderr().print(f"{plan.title}: {error}")
    return failed


def _plans(entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task]) -> list[_Plan]:
    plans: dict[Path, _Plan] = {}
    for name, entry in entries.items():
        used = {split for task in entry.tasks or () if task in tasks for split in used_splits(task)}
        splits = {split for split in entry.splits if split in used and not entry.is_of_another_set(split)}
        if entry.download and _is_missing(entry, splits, data_root):
            root = (data_root / entry.location).resolve()
            unused = entry.splits.keys() - splits
            sources = [each for each in entry.download if each.get("split") not in unused and not _is_there(each, root)]
            if sources:
                plan = plans.setdefault(root, _Plan(root))
                plan.names.append(name)
                plan.sources += [source for source in sources if source not in plan.sources]
                plan.splits |= {str(entry.splits[split].get("split", split)) for split in splits}
    return list(plans.values())


def _is_missing(entry: SuiteEntry, splits: Iterable[str], data_root: Path) -> bool:
    """Whether files of a split are not there; the evaluation says what else is wrong with them."""
    for split in splits:
        try:
            entry.open(split, 0, data_root)
        except MissingData:
            return True
        except InputError:
            continue
    return False


def _is_there(source: Mapping[str, Any], root: Path) -> bool:
    """Whether torchvision finds its set; then the suite's set lacks something else, which it does not download."""
    if "torchvision" not in source:
        return False
    try:
        _torchvision_set(source, root)
    except Exception:  # torchvision's classes raise anything for missing files
        return False
    return True


def _torchvision_set(source: Mapping[str, Any], root: Path, **options: Any) -> Any:
    found = getattr(importlib.import_module("torchvision.datasets"), source["torchvision"], None)
    require(found is not None, f"download: torchvision.datasets has no {source['torchvision']}")
    assert found is not None
    return found(str(root), **{key: value for key, value in source.items() if key != "torchvision"}, **options)


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a module or class."""
    before = {name: vars(owner)[name] for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _of_hub(plan: _Plan, name: str) -> list[RemoteFile]:
    """Return the missing files of a data set of the hub, among those at its top and in folders of wanted splits."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    guard_hub()
    try:
        info = HfApi().dataset_info(name, revision="main", files_metadata=True)
        listed = [file for file in info.siblings or [] if not file.rfilename.startswith(".")]
    except Exception as error:  # offline, gated, no such data set, or an error of the HTTP library
        raise InputError(f"{name}: cannot be downloaded from the hub ({first_line(error)})") from error
    files = []
    with naming(name):
        commit = checked_commit(info.sha)
        for file in listed:
            folder, slash, _ = file.rfilename.partition("/")
            if slash and folder not in plan.splits:
                continue
            checked_path(plan.content, file.rfilename)
            known = file.size is None or (type(file.size) is int and file.size >= 0)
            require(known, f"the size {shortened(file.size)} of {file.rfilename} is no number of bytes")
            checksum = str(file.lfs.sha256 if file.lfs else file.blob_id)
            url = hf_hub_url(name, file.rfilename, repo_type="dataset", revision=commit)
            files.append(RemoteFile(url, file.rfilename, file.size, checksum, build_hf_headers()))
    require(bool(files), f"{name}: no files of {', '.join(sorted(plan.splits))} on the hub")
    return list(filter(plan.lacks, files))


def _amount(size: int, more: bool) -> str:
    """Format a number of bytes; torchvision does not say how large its files are."""
    if not more:
        return size_in_bytes(size)
    return f"{size_in_bytes(size)} and files of unknown size" if size else "unknown size"


def _download(plan: _Plan) -> None:
    """Download what is missing now: another process may have been faster."""
    try:
        with _alone(plan):
            shutil.rmtree(plan.content, ignore_errors=True)  # an earlier run may have left it half unpacked
            for folder in (plan.stage / "transfers", plan.content):
                folder.mkdir(parents=True, exist_ok=True)
            for file in filter(plan.lacks, plan.files):
                _fetch(plan, file, plan.content / file.name)
            for source in plan.of_torchvision:
                if not _is_there(source, plan.root):
                    _unpack(plan, source)
            _publish(plan.content, plan.root)
            shutil.rmtree(plan.stage)
    except OSError as error:
        raise not_written(plan.root, error) from error


@contextmanager
def _alone(plan: _Plan) -> Iterator[None]:
    """Wait until no other process downloads into the folder, and hold it; a killed process holds nothing."""
    path = plan.stage.with_name(f"{plan.stage.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):  # a file system without locks
        try:
            lock.acquire(blocking=False)
        except Timeout:
            stderr().print(f"{plan.title}: waiting for another process that downloads into {plan.root}")
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def _fetch(plan: _Plan, file: RemoteFile, path: Path) -> None:
    """Download a file to the stage, unless it is kept there, and put it at ``path``."""
    kept = plan.kept(file)
    if not kept.exists() or file.size not in (None, kept.stat().st_size):
        kept.unlink(missing_ok=True)
        transfer(file, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(kept, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(kept, path)


def _unpack(plan: _Plan, source: Mapping[str, Any]) -> None:
    """Let torchvision compare its archives with their checksums and unpack them, members inside of the folder only."""
    from torchvision.datasets import utils

    latest, unpack = list[RemoteFile](), utils.extract_archive

    def retrieve(url: str, path: str, *_: Any) -> None:
        latest[:] = [RemoteFile(url, path, size_on_server(url))]
        _fetch(plan, latest[0], Path(path))

    functions = {
        "_urlretrieve": retrieve,
        "_get_redirect_url": lambda url, **_: url,
        "extract_archive": lambda archive, folder=None, *_: unpack(archive, folder, remove_finished=True),
    }
    try:
        inside = staticmethod(tarfile.data_filter)  # which is Python's default from 3.14 only
        with _replaced(utils, **functions), _replaced(tarfile.TarFile, extraction_filter=inside):
            _torchvision_set(source, plan.content, download=True)
    except InputError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        message = f"torchvision.datasets.{source['torchvision']} could not get the set: {first_line(error)}"
        if latest and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            plan.kept(latest[0]).unlink(missing_ok=True)
            message += f"; {latest[0].url} is removed, to be downloaded again"
        raise InputError(message) from error


def _publish(content: Path, root: Path) -> None:
    """Move all files to the set's folder: at once if it is new, else one by one."""
    if not root.exists():
        content.rename(root)
        return
    for path in sorted(content.rglob("*")):
        target = root / path.relative_to(content)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(target)
