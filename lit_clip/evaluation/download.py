"""Download the sets of a suite that torchvision or the Hugging Face hub has.

Files are transferred here, not by those packages: a transfer that was interrupted resumes where it ended, and each file
is compared with its checksum. Torchvision then finds its archives and unpacks them. All this happens in a hidden folder
beside the set's, whose content is moved there when it is complete: at once if the set's folder is new, else file by
file. Processes that would download into the same folder wait for each other.
"""

import errno
import importlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task
from lit_clip.evaluation.tasks import used_splits
from lit_clip.tools.atomic import make_folder, not_written
from lit_clip.tools.console import size_in_bytes, stderr
from lit_clip.tools.hashing import hash64
from lit_clip.tools.hub_client import first_line, guard_hub
from lit_clip.tools.reading import naming
from lit_clip.tools.remote_names import checked_commit, checked_path
from lit_clip.tools.transfers import Checksum, Transfer, fetch, lacking, size_on_server
from lit_clip.tools.untrusted import shortened

try:
    import fcntl
except ImportError:  # Windows, where downloads are not kept apart
    fcntl = None

# What torchvision's data sets call to download and unpack; some import it into their own module.
CALLS = ["download_url", "download_and_extract_archive", "extract_archive", "download_file_from_google_drive"]
CALLS += ["_decompress"]


@dataclass
class _Plan:
    """What a folder lacks.

    Attributes:
        root: the folder.
        names: of the suite's sets in it.
        sources: how to get it, as in :class:`lit_clip.evaluation.suite.SuiteEntry`.
        splits: subfolders wanted of a data set of the hub.
        transfers: the files of each source.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)
    transfers: list[list[Transfer]] = field(default_factory=list)

    @property
    def stage(self) -> Path:
        return self.root.with_name(f".{self.root.name}.download")

    @property
    def content(self) -> Path:
        return self.stage / "content"

    def kept(self, transfer: Transfer) -> Path:
        """Return where a file is kept until the set is complete."""
        return self.stage / "transfers" / f"{hash64(transfer.url).hex()}-{transfer.path.name}"


def download_missing(
    entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task] = TASKS
) -> dict[str, str]:
    """Download what is not below ``data_root`` of the sets that say how; return why some could not be, by name.

    Splits that none of the ``tasks`` uses, and those of another set, are not downloaded for a set.
    """
    make_folder(data_root, "--data_root")
    failed: dict[str, str] = {}
    plans: list[_Plan] = []
    for plan in _plans(entries, data_root, tasks):
        try:
            found = [(source, _transfers(plan, source)) for source in plan.sources]
            # Torchvision may name no files, and gets them by itself.
            found = [(source, transfers) for source, transfers in found if transfers or "torchvision" in source]
            if found:
                plan.sources, plan.transfers = map(list, zip(*found, strict=True))
                plans.append(plan)
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
    free = shutil.disk_usage(data_root).free
    fitting = _fitting(plans, free)
    if fitting:
        _announce(fitting, data_root)
    for plan in plans:
        try:
            size, space = size_in_bytes(_size_of(plan)), size_in_bytes(free)
            require(plan in fitting, f"--data_root {data_root}: {size} do not fit; {space} are free for all sets")
            _download(plan)
        except InputError as error:
            failed |= dict.fromkeys(plan.names, str(error))
            stderr().print(f"{', '.join(plan.names)}: {error}")
    return failed


def _plans(entries: Mapping[str, SuiteEntry], data_root: Path, tasks: Collection[Task]) -> list[_Plan]:
    plans: dict[Path, _Plan] = {}
    for name, entry in entries.items():
        splits = _own_splits(entry, tasks)
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


def _own_splits(entry: SuiteEntry, tasks: Collection[Task]) -> set[str]:
    """Return the splits of this set, not of another one, that some of the tasks use."""
    used = {split for task in entry.tasks or () if task in tasks for split in used_splits(task)}
    return {split for split in entry.splits if split in used and not entry.is_of_another_set(split)}


def _is_missing(entry: SuiteEntry, splits: Iterable[str], data_root: Path) -> bool:
    """Whether files of a split are not there; what else is wrong with them is for the evaluation to say."""
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
        _torchvision_class(source)(str(root), **_arguments(source))
    except Exception:  # torchvision's classes raise anything for missing files
        return False
    return True


def _torchvision_class(source: Mapping[str, Any]) -> Any:
    found = getattr(importlib.import_module("torchvision.datasets"), source["torchvision"], None)
    require(found is not None, f"download: torchvision.datasets has no {source['torchvision']}")
    return found


def _arguments(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "torchvision"}


def _transfers(plan: _Plan, source: Mapping[str, Any]) -> list[Transfer]:
    return _of_hub(plan, source["hub"]) if "hub" in source else _of_torchvision(plan, source)


def _of_torchvision(plan: _Plan, source: Mapping[str, Any]) -> list[Transfer]:
    """Return the files that torchvision would download, by letting it, with calls that only note them."""
    noted: list[Transfer] = []
    with tempfile.TemporaryDirectory() as folder:

        def note(url: str, root: Any, filename: Any, checksum: str | None, archive: bool) -> None:
            below = Path(os.path.expanduser(root)).relative_to(folder)
            path = plan.content / below / (filename or os.path.basename(url))
            noted.append(
                Transfer(url, path, size_on_server(url), Checksum("md5", checksum) if checksum else None, archive)
            )

        def download_url(url: str, root: Any, filename: Any = None, md5: str | None = None, **_: Any) -> None:
            note(url, root, filename, md5, archive=False)

        def download_and_extract_archive(
            url: str,
            download_root: Any,
            extract_root: Any = None,
            filename: Any = None,
            md5: str | None = None,
            **_: Any,
        ) -> None:
            note(url, download_root, filename, md5, archive=True)

        def nothing(*_: Any, **__: Any) -> None:
            pass

        replacements = {
            **dict.fromkeys(CALLS, nothing),
            "download_url": download_url,
            "download_and_extract_archive": download_and_extract_archive,
        }
        with _replaced(_torchvision_class(source), replacements), suppress(Exception):  # nothing is there to be read
            _torchvision_class(source)(folder, download=True, **_arguments(source))
    return noted


@contextmanager
def _replaced(of_class: Any, functions: Mapping[str, Any]) -> Iterator[None]:
    """Replace functions that a data set of torchvision calls, in its own module and where they are defined."""
    modules = [importlib.import_module(name) for name in ("torchvision.datasets.utils", of_class.__module__)]
    before = [
        (module, name, getattr(module, name)) for module in modules for name in functions if hasattr(module, name)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, functions[name])
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _of_hub(plan: _Plan, name: str) -> list[Transfer]:
    """Return the missing files of a data set of the hub, among those at its top and in folders of wanted splits."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    guard_hub()
    try:
        info = HfApi().dataset_info(name, revision="main", files_metadata=True)
        files = [file for file in info.siblings or [] if not file.rfilename.startswith(".")]
    except Exception as error:  # offline, gated, no such data set, or an error of the HTTP library
        raise InputError(f"{name}: cannot be downloaded from the hub ({first_line(error)})") from error
    transfers = []
    with naming(name):
        commit = checked_commit(info.sha)
        for file in files:
            folder, slash, _ = file.rfilename.partition("/")
            if slash and folder not in plan.splits:
                continue
            path = checked_path(plan.content, file.rfilename)
            known = file.size is None or (type(file.size) is int and file.size >= 0)
            require(known, f"the size {shortened(file.size)} of {file.rfilename} is no number of bytes")
            checksum = Checksum("sha256", file.lfs.sha256) if file.lfs else Checksum("git", str(file.blob_id))
            url = hf_hub_url(name, file.rfilename, repo_type="dataset", revision=commit)
            transfers.append(Transfer(url, path, file.size, checksum, headers=build_hf_headers()))
    require(bool(transfers), f"{name}: no files of {', '.join(sorted(plan.splits))} on the hub")
    return _missing(plan, transfers)


def _missing(plan: _Plan, transfers: Iterable[Transfer]) -> list[Transfer]:
    return [each for each in transfers if not (plan.root / each.path.relative_to(plan.content)).exists()]


def _fitting(plans: Iterable[_Plan], free: int) -> list[_Plan]:
    """Return the plans for which the disk has space, taken in order."""
    fitting = []
    for plan in plans:
        size = _size_of(plan)
        if size <= free:
            fitting.append(plan)
            free -= size
    return fitting


def _size_of(plan: _Plan) -> int:
    """Return how many bytes are still to be transferred, as far as servers say it."""
    return sum(lacking(plan.kept(each), each.size) for each in chain(*plan.transfers) if each.size is not None)


def _announce(plans: Iterable[_Plan], data_root: Path) -> None:
    """Say what will be downloaded and how much that is."""
    total, unknown, lines = 0, False, []
    for plan in plans:
        known = _size_of(plan)
        incomplete = [] in plan.transfers or any(each.size is None for each in chain(*plan.transfers))
        total, unknown = total + known, unknown or incomplete
        lines.append(f"  {', '.join(plan.names)}: {_amount(known, incomplete)}")
    stderr().print(f"downloading {_amount(total, unknown)} into {data_root}:\n" + "\n".join(lines))


def _amount(known: int, incomplete: bool) -> str:
    if not incomplete:
        return size_in_bytes(known)
    return f"{size_in_bytes(known)} and files of unknown size" if known else "unknown size"


def _download(plan: _Plan) -> None:
    try:
        with _alone(plan):
            _download_alone(plan)
    except OSError as error:
        raise not_written(plan.root, error) from error


@contextmanager
def _alone(plan: _Plan) -> Iterator[None]:
    """Wait until no other process downloads into the folder, and hold it; if this process is killed it is free."""
    path = plan.stage.with_name(f"{plan.stage.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = False
    while not held:
        with path.open("w") as file:
            _wait_for(file, plan)
            held = _is_current(file, path)
            if held:
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink()


def _wait_for(file: IO[str], plan: _Plan) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stderr().print(f"{', '.join(plan.names)}: waiting for another process that downloads into {plan.root}")
            fcntl.flock(file, fcntl.LOCK_EX)


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether the name is still that of the open file; its earlier holder removes it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _download_alone(plan: _Plan) -> None:
    """Download what is missing now: another process may have been faster."""
    shutil.rmtree(plan.content, ignore_errors=True)  # what an earlier run may have left half unpacked
    for folder in (plan.stage / "transfers", plan.content):
        folder.mkdir(parents=True, exist_ok=True)
    for source, transfers in zip(plan.sources, plan.transfers, strict=True):
        if _is_there(source, plan.root):
            continue
        for transfer in transfers if "torchvision" in source else _missing(plan, transfers):
            file = plan.kept(transfer)
            fetch(transfer, file)
            transfer.path.parent.mkdir(parents=True, exist_ok=True)
            _link(file, transfer.path)
        if "torchvision" in source:
            _unpack(plan, source, transfers)
        for transfer in transfers:
            if transfer.archive:
                transfer.path.unlink(missing_ok=True)
    _publish(plan.content, plan.root)
    shutil.rmtree(plan.stage)


def _link(file: Path, path: Path) -> None:
    try:
        os.link(file, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, path)


def _unpack(plan: _Plan, source: Mapping[str, Any], transfers: Sequence[Transfer]) -> None:
    """Let torchvision unpack its archives, and download what is not on an ordinary server."""
    try:
        with _inside_of_folder():
            _torchvision_class(source)(str(plan.content), download=True, **_arguments(source))
    except Exception as error:  # a damaged archive can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"torchvision.datasets.{source['torchvision']} could not get the set: {reason}"
        doubtful = [transfer for transfer in transfers if transfer.archive and transfer.checksum is None]
        if doubtful and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            for transfer in doubtful:
                plan.kept(transfer).unlink(missing_ok=True)
            message += f"; {', '.join(transfer.url for transfer in doubtful)} is removed, to be downloaded again"
        raise InputError(message) from error


@contextmanager
def _inside_of_folder() -> Iterator[None]:
    """Refuse members of tar files that would be outside of the folder, which Python does by default only from 3.14."""
    require(hasattr(tarfile, "data_filter"), "archives cannot be unpacked safely; use Python 3.11.4 or newer")
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


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
