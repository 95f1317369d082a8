"""Download sets of a suite from torchvision or the Hugging Face hub.

Both libraries compare the files with their checksums. All this happens in a hidden folder beside the set's, whose
content is moved there when it is complete: at once if the set's folder is new, else file by file. Transfers from the
hub resume. Processes that would download into the same folder wait for each other.
"""

import importlib
import os
import shutil
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task
from lit_clip.evaluation.tasks import used_splits
from lit_clip.tools.atomic import make_folder
from lit_clip.tools.console import size_in_bytes, stderr
from lit_clip.tools.hub_client import checked_relative, guard_hub
from lit_clip.tools.reading import first_line

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".gz")


class _HubFile(NamedTuple):
    repository: str
    commit: str
    name: str
    size: int


@dataclass
class _Plan:
    """A folder that lacks sets of a suite, and their sources."""

    root: Path
    names: list[str] = field(default_factory=list)
    torchvision: list[dict[str, Any]] = field(default_factory=list)
    hub: list[str] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)  # subfolders wanted of a data set of the hub
    files: list[_HubFile] = field(default_factory=list)  # of the hub, which are missing

    @property
    def stage(self) -> Path:
        return self.root.with_name(f".{self.root.name}.download")

    def lacks(self, file: _HubFile) -> bool:
        return not (self.root / file.name).exists()


def download_missing(
    entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task] = TASKS
) -> dict[str, str]:
    """Download a suite's missing sets that have a ``download``; return the failures, by set.

    Splits that none of the ``tasks`` uses, and splits of another set, are not downloaded for a set.
    """
    make_folder(data_root, "--data_root")
    failed: dict[str, str] = {}
    plans: list[_Plan] = []
    for plan in _plans(entries, data_root, tasks):
        try:
            plan.files = [file for name in plan.hub for file in _of_hub(plan, name)]
            plans += [plan] if plan.files or plan.torchvision else []
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
    if plans:
        size = size_in_bytes(sum(file.size for plan in plans for file in plan.files))
        more = " and files of unknown size" if any(plan.torchvision for plan in plans) else ""
        names = ", ".join(name for plan in plans for name in plan.names)
        stderr().print(f"downloading {size}{more} into {data_root}: {names}")
    for plan in plans:
        try:
            make_folder(plan.root.parent, "--data_root")
            with _alone(plan):
                _download(plan)
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
            stderr().print(f"{', '.join(plan.names)}: {error}")
    return failed


def _plans(entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task]) -> list[_Plan]:
    plans: dict[Path, _Plan] = {}
    for name, entry in entries.items():
        used = {split for task in entry.tasks or () if task in tasks for split in used_splits(task)}
        splits = {split for split in entry.splits if split in used and not entry.is_of_another_set(split)}
        if not entry.download or not _is_missing(entry, splits, data_root):
            continue
        plan = _Plan((data_root / entry.location).resolve())
        for source in entry.download:
            if "hub" in source:
                plan.hub.append(source["hub"])
            elif source.get("split") not in entry.splits.keys() - splits and not _is_there(source, plan.root):
                plan.torchvision.append(source)
        if plan.hub or plan.torchvision:
            known = plans.setdefault(plan.root, plan)
            known.names.append(name)
            known.hub += [source for source in plan.hub if source not in known.hub]
            known.torchvision += [source for source in plan.torchvision if source not in known.torchvision]
            known.splits |= {str(entry.splits[split].get("split", split)) for split in splits}
    return list(plans.values())


def _is_missing(entry: SuiteEntry, splits: Iterable[str], data_root: Path) -> bool:
    """Return whether files of a split are missing; the evaluation reports other problems."""
    for split in splits:
        try:
            entry.open(split, 0, data_root)
        except MissingData:
            return True
        except InputError:
            continue
    return False


def _is_there(source: Mapping[str, Any], root: Path) -> bool:
    """Return whether torchvision finds its set; if so, other files are missing, which it does not download."""
    try:
        _torchvision_set(source, root)
    except Exception:  # torchvision's classes raise anything for missing files
        return False
    return True


def _torchvision_set(source: Mapping[str, Any], root: Path, **options: Any) -> Any:
    found = getattr(importlib.import_module("torchvision.datasets"), source["torchvision"], None)
    if found is None:
        raise InputError(f"download: torchvision.datasets has no {source['torchvision']}")
    return found(str(root), **{key: value for key, value in source.items() if key != "torchvision"}, **options)


def _of_hub(plan: _Plan, name: str) -> list[_HubFile]:
    """Return a hub data set's missing files, at its top and in the folders of wanted splits."""
    from huggingface_hub import HfApi

    guard_hub()
    try:
        info = HfApi().dataset_info(name, revision="main", files_metadata=True)
        listed = [(file.rfilename.partition("/"), file) for file in info.siblings or []]
        wanted = [file for (top, slash, _), file in listed if top in plan.splits or not (slash or top.startswith("."))]
        files = [
            _HubFile(name, str(info.sha), checked_relative(file.rfilename), int(file.size or 0)) for file in wanted
        ]
    except Exception as error:  # offline, gated, no such data set, or an error of the HTTP library
        raise InputError(f"{name}: cannot be downloaded from the hub ({first_line(error)})") from error
    require(bool(files), f"{name}: no files of {', '.join(sorted(plan.splits))} on the hub")
    return list(filter(plan.lacks, files))


@contextmanager
def _alone(plan: _Plan) -> Iterator[None]:
    """Lock the folder after other processes have finished downloading into it; a killed process holds no lock."""
    lock = FileLock(plan.stage.with_name(f"{plan.stage.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        stderr().print(f"{', '.join(plan.names)}: waiting for another process that downloads into {plan.root}")
        lock.acquire()
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _download(plan: _Plan) -> None:
    """Download the files missing now: another process may have been faster."""
    hub, unpacked = plan.stage / "hub", plan.stage / "torchvision"
    shutil.rmtree(unpacked, ignore_errors=True)  # torchvision takes what is half unpacked for the whole set
    try:
        _fetch(list(filter(plan.lacks, plan.files)), hub)
        for source in plan.torchvision:
            if not _is_there(source, plan.root):
                _unpack(source, unpacked)
        for folder in filter(Path.exists, (hub, unpacked)):
            if plan.root.exists():
                shutil.copytree(folder, plan.root, copy_function=os.replace, dirs_exist_ok=True)
            else:
                folder.rename(plan.root)
    except InputError:
        raise
    except Exception as error:  # of the network or the disk; a damaged archive can raise anything
        hint = "run the same command again to resume"
        raise InputError(f"{', '.join(plan.names)}: cannot be downloaded ({first_line(error)}); {hint}") from error
    shutil.rmtree(plan.stage, ignore_errors=True)


def _fetch(files: list[_HubFile], folder: Path) -> None:
    """Download files from the hub, and verify its checksums."""
    from huggingface_hub import HfApi, hf_hub_download

    for repository, commit, name, _ in files:
        hf_hub_download(repository, name, repo_type="dataset", revision=commit, local_dir=folder)
    for repository, commit in {(file.repository, file.commit) for file in files}:
        checked = HfApi().verify_repo_checksums(repository, repo_type="dataset", revision=commit, local_dir=folder)
        wrong = [each["path"] for each in checked.mismatches]
        for name in wrong:
            (folder / name).unlink()
        require(not wrong, f"{repository}: the checksum of {', '.join(wrong)} is wrong; not kept")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # what hf_hub_download resumes from


def _unpack(source: Mapping[str, Any], folder: Path) -> None:
    """Let torchvision download, verify and unpack its archives inside the folder only; remove them."""
    before = vars(tarfile.TarFile)["extraction_filter"]
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # which is Python's default from 3.14 only
    try:
        _torchvision_set(source, folder, download=True)
    finally:
        tarfile.TarFile.extraction_filter = before
    for path in list(folder.rglob("*")):
        if path.name.endswith(ARCHIVES) and path.is_file():
            path.unlink()
