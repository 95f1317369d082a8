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
from pathlib import Path
from typing import Any

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


def download_missing(
    entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task] = TASKS
) -> dict[str, str]:
    """Download a suite's missing sets that have a ``download``; return the failures, by set.

    Splits that none of the ``tasks`` uses, and splits of another set, are not downloaded for a set.
    """
    make_folder(data_root, "--data_root")
    failed: dict[str, str] = {}
    broken: dict[Path, str] = {}  # folders whose sets cannot be downloaded, and why: another set's try is no better
    for name, entry in entries.items():
        used = {split for task in entry.tasks or () if task in tasks for split in used_splits(task)}
        splits = {split for split in entry.splits if split in used and not entry.is_of_another_set(split)}
        if not entry.download or not _is_missing(entry, splits, data_root):
            continue
        root = (data_root / entry.location).resolve()
        try:
            require(root not in broken, broken.get(root, ""))
            make_folder(root.parent, "--data_root")
            with _alone(name, root):
                _download(name, entry, splits, root)
        except InputError as error:
            failed[name] = broken[root] = str(error)
            stderr().print(f"{name}: {error}")
    return failed


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


@contextmanager
def _alone(name: str, root: Path) -> Iterator[None]:
    """Lock a folder after other processes have finished downloading into it; a killed process holds no lock."""
    lock = FileLock(root.with_name(f".{root.name}.download.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        stderr().print(f"{name}: waiting for another process that downloads into {root}")
        lock.acquire()
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _download(name: str, entry: SuiteEntry, splits: Collection[str], root: Path) -> None:
    """Download the files that ``root`` lacks now: another process may have been faster."""
    stage = root.with_name(f".{root.name}.download")
    hub, unpacked = stage / "hub", stage / "torchvision"
    shutil.rmtree(unpacked, ignore_errors=True)  # torchvision takes what is half unpacked for the whole set
    folders = {str(entry.splits[split].get("split", split)) for split in splits}
    try:
        for source in entry.download:
            if "hub" in source:
                _fetch(name, source["hub"], folders, root, hub)
            elif source.get("split") not in entry.splits.keys() - splits and not _is_there(source, root):
                stderr().print(f"{name}: downloading torchvision's {source['torchvision']} into {root}")
                _unpack(source, unpacked)
        for folder in filter(Path.exists, (hub, unpacked)):
            if root.exists():
                shutil.copytree(folder, root, copy_function=os.replace, dirs_exist_ok=True)
            else:
                folder.rename(root)
    except InputError:
        raise
    except Exception as error:  # of the network or the disk; a damaged archive can raise anything
        hint = "run the same command again to resume"
        raise InputError(f"{name}: cannot be downloaded ({first_line(error)}); {hint}") from error
    shutil.rmtree(stage, ignore_errors=True)


def _fetch(name: str, repository: str, splits: Collection[str], root: Path, folder: Path) -> None:
    """Download a hub data set's files that ``root`` lacks, at its top and in the folders of ``splits``; verify them."""
    from huggingface_hub import HfApi, hf_hub_download

    guard_hub()
    try:
        info = HfApi().dataset_info(repository, revision="main", files_metadata=True)
        listed = [(file.rfilename.partition("/"), file) for file in info.siblings or []]
        wanted = [file for (top, slash, _), file in listed if top in splits or not (slash or top.startswith("."))]
        sizes = {checked_relative(file.rfilename): int(file.size or 0) for file in wanted}
    except Exception as error:  # offline, gated, no such data set, or an error of the HTTP library
        raise InputError(f"{repository}: cannot be downloaded from the hub ({first_line(error)})") from error
    require(bool(sizes), f"{repository}: no files of {', '.join(sorted(splits))} on the hub")
    sizes = {file: size for file, size in sizes.items() if not (root / file).exists()}
    if not sizes:
        return
    stderr().print(f"{name}: downloading {size_in_bytes(sum(sizes.values()))} into {root}")
    source: Any = {"repo_type": "dataset", "revision": str(info.sha), "local_dir": folder}
    for file in sizes:
        hf_hub_download(repository, file, **source)
    wrong = [each["path"] for each in HfApi().verify_repo_checksums(repository, **source).mismatches]
    for file in wrong:
        (folder / file).unlink()
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
