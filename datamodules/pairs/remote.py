"""Remote pairs: tables in a store, and data sets on the Hugging Face hub by name.

A table is downloaded once for each version; the images that it names stay in the store. Of a data set's repository only
file names and parquet files are used, downloaded into huggingface_hub's cache; its card and scripts are not read.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lit_clip.errors import InputError, listed, require
from lit_clip.secrets import without_secrets
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.hub_client import COMMIT, checked_commit, checked_relative, guard_hub
from lit_clip.tools.own_files import default_cache_dir, writing_cached
from lit_clip.tools.reading import first_line, naming
from lit_clip.tools.untrusted import shortened
from ..loading.store import fetch, stamp_of
from .columns import ColumnPairs
from .parquet import open_parquet
from .source import PairSource, SourceOptions, find_split

VERSION = re.compile(r"[0-9a-f]{24}")


def url_suffix(url: str) -> str:
    """Return the suffix of a URL's file name, without the query, in lower case."""
    return Path(url.partition("?")[0]).suffix.lower()


def fetch_table(url: str, version: str | None) -> tuple[Path, str]:
    """Download a table into the cache unless the version (None: the present one) is there; return path and version."""
    name = url.partition("?")[0].rpartition("/")[2]
    folder = default_cache_dir() / "remote-tables"
    require(version is None or VERSION.fullmatch(version) is not None, f"{url}: {shortened(version)} is no version")
    if version is not None and (folder / version / name).is_file():
        return folder / version / name, version
    try:
        stamp = stamp_of(url)
        present = hex_digest([url, *stamp])[:24]
        if version not in (None, present):
            raise InputError(
                f"{url}: has changed since the checkpoint was saved; put the former table back, or start a new run "
                "from the checkpoint's weights (model.pretrained)"
            )
        fetch(url, stamp, folder / present / name)
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such file") from error
    return folder / present / name, present


def open_remote_table(
    url: str, options: SourceOptions, open_file: Callable[[Path, SourceOptions], PairSource]
) -> PairSource:
    """Open a table in a store; relative image paths start from the table's folder there."""
    path, version = fetch_table(url, options.versions.get(without_secrets(url)))
    folder = url.partition("?")[0].rpartition("/")[0]
    try:
        columns = replace(options.columns, root=options.columns.root or folder)
        source = open_file(path, options._replace(columns=columns))
    except InputError as error:
        raise InputError(str(error).replace(str(path), url)) from error
    assert isinstance(source, ColumnPairs)
    return source.copied_from(url, version, str(path))


DOWNLOADS = 4  # files at once
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<configuration>[\w.+ -]+))?")


class HubName(NamedTuple):
    """Parts of ``owner/name``, ``owner/name@revision`` or ``owner/name@revision:configuration``."""

    repository: str
    revision: str | None
    configuration: str | None


class Listing(NamedTuple):
    """The parquet files of a repository at a commit, as sorted relative paths."""

    commit: str
    files: list[str]

    @classmethod
    def checked(cls, commit: object, files: Iterable[object]) -> "Listing":
        """Check a listing from the hub or from a cached file."""
        return cls(checked_commit(commit), sorted(map(checked_relative, files)))


def parse_hub_name(name: str) -> HubName | None:
    """Return the parts of a data set's name on the hub; None if it cannot be one, or its first folder exists."""
    match = NAME.fullmatch(name)
    if match is None or Path(name).parts[0] in (".", "..") or Path(name).parent.is_dir():
        return None
    return HubName(match["repository"], match["revision"], match["configuration"])


def open_hub_data(name: str, parts: HubName, options: SourceOptions) -> PairSource:
    """Download and open one split of a data set; ``options.versions`` may fix the commit of this name."""
    with naming(name):
        known = options.versions.get(name)
        revision = checked_commit(known) if known else checked_relative(parts.revision or "main")
        commit, files = _list_files(name, parts.repository, revision)
    require(bool(files), f"{name}: has no parquet files on the hub; download it and give its table, folder or shards")
    files = _files_of_split(name, parts, files, options)
    paths = _download(name, parts.repository, commit, files)
    snapshot = str(paths[0]).removesuffix(files[0]).rstrip("/")
    try:
        source = open_parquet(paths, options)
    except InputError as error:
        raise InputError(str(error).replace(snapshot, name)) from error
    assert isinstance(source, ColumnPairs)
    source.inside = True
    return source.copied_from(name, commit, snapshot)


def _list_files(name: str, repository: str, revision: str) -> Listing:
    """Return the files at a revision; without a network, the files of the last listing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    guard_hub()
    if COMMIT.fullmatch(revision) and (known := _remembered(repository, revision)):
        return known
    try:
        info = HfApi().dataset_info(repository, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or [] if sibling.rfilename.endswith(".parquet")]
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: has no revision {revision} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        hint = "if it is private, set HF_TOKEN"
        raise InputError(f"{name}: no such file or folder, and no such data set on the hub ({hint})") from error
    except Exception as error:  # offline, or an error of the HTTP library, which huggingface_hub has changed
        known = _remembered(repository, revision)
        if known is None:
            raise InputError(
                f"{name}: no such file or folder, and as a data set of the hub neither reachable nor cached "
                f"({first_line(error)})"
            ) from error
        return known
    listing = Listing.checked(info.sha, files)
    for key in {revision, listing.commit}:
        with writing_cached(_listing_file(repository, key)) as draft:
            draft.write_text(json.dumps(listing._asdict()), encoding="utf-8")
    return listing


def _listing_file(repository: str, revision: str) -> Path:
    return default_cache_dir() / "hub" / repository.replace("/", "--") / f"{revision.replace('/', '--')}.json"


def _remembered(repository: str, revision: str) -> Listing | None:
    try:
        values = json.loads(_listing_file(repository, revision).read_text(encoding="utf-8"))
        return Listing.checked(values["commit"], values["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _files_of_split(name: str, parts: HubName, files: Sequence[str], options: SourceOptions) -> list[str]:
    placed = [(*_configuration_and_split(PurePosixPath(file)), file) for file in files]
    found = list(dict.fromkeys(configuration for configuration, _, _ in placed))
    wanted = parts.configuration or (found[0] if len(found) == 1 else "default")
    if wanted not in found:
        problem = f"no configuration {wanted!r}" if parts.configuration else "it has several configurations"
        base = name.removesuffix(f":{parts.configuration}")
        raise InputError(f"{name}: {problem}; it has {listed(found)}; give one, such as {base}:{found[0]}")
    splits = [(split, file) for configuration, split, file in placed if configuration == wanted]
    split = find_split(name, list(dict.fromkeys(split for split, _ in splits)), options)
    chosen = [file for each, file in splits if each == split]
    total = re.search(r"-\d{5}-of-(\d{5})", chosen[0])
    complete = total is None or int(total[1]) == len(chosen)
    require(
        complete, f"{name}: the hub has only {len(chosen)} of the files of split {split}; ask its owner for the rest"
    )
    return chosen


def _configuration_and_split(file: PurePosixPath) -> tuple[str, str]:
    """Return configuration and split from ``data/SPLIT-00000-of-00001``, ``CONFIGURATION/SPLIT/0000``, ..."""
    folders = [part for part in file.parts[:-1] if part != "data"]
    numbered = re.match(r"(.+?)-\d{5}-of-\d{5}", file.stem)
    split = "train"
    if numbered or file.stem in SPLITS:
        split = numbered[1] if numbered else file.stem
    elif folders and (folders[-1] in SPLITS or re.fullmatch(r"\d{4}", file.stem)):
        split = folders.pop()
    return "/".join(folders) or "default", split


def _download(name: str, repository: str, commit: str, files: Sequence[str]) -> list[Path]:
    """Return the files in huggingface_hub's cache; download only the missing files."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    options: dict[str, Any] = {"repo_type": "dataset", "revision": commit}
    try:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            return [Path(path) for path in pool.map(lambda file: hf_hub_download(repository, file, **options), files)]
    except GatedRepoError as error:
        raise InputError(f"{name}: is gated; accept its terms on its page on the hub and set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{name}: the hub cannot be reached, and some of its files are not cached") from error
    except Exception as error:  # see above
        raise InputError(f"{name}: cannot be downloaded from the hub ({first_line(error)})") from error
