"""Tables in a store: downloaded once for each version; the images that they name stay in the store."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lit_clip.errors import InputError, require
from lit_clip.secrets import without_secrets
from lit_clip.tools.cache_folder import default_cache_dir
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.untrusted import shortened
from ..loading.store import fetch, stamp_of
from .columns import ColumnPairs
from .source import PairSource, SourceOptions

VERSION = re.compile(r"[0-9a-f]{24}")


def url_suffix(url: str) -> str:
    """Return the suffix of a URL's file, without its query, in lower case."""
    return Path(url.partition("?")[0]).suffix.lower()


def fetch_table(url: str, version: str | None) -> tuple[Path, str]:
    """Download a table into the cache folder, unless this version (None: the present one) is there; return both."""
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
    """Open a table in a store; relative image paths start from its folder in the store."""
    path, version = fetch_table(url, options.versions.get(without_secrets(url)))
    folder = url.partition("?")[0].rpartition("/")[0]
    try:
        columns = replace(options.columns, root=options.columns.root or folder)
        source = open_file(path, options._replace(columns=columns))
    except InputError as error:
        raise InputError(str(error).replace(str(path), url)) from error
    assert isinstance(source, ColumnPairs)
    return source.copied_from(url, version, str(path))
