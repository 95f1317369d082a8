"""Recognise and open a source of pairs, whatever its format."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.pairs.source import DELIMITED, JSON_LINES, PairSource, SourceOptions
from lit_clip.errors import InputError, require

TAKEN = (
    "a table (.csv, .tsv, .txt, .jsonl, .ndjson, .json, .parquet), COCO's or Karpathy's JSON, a folder of images "
    "with a .txt beside each, a folder of parquet files, a data set saved by Hugging Face's datasets, or tar shards"
)


def open_source(path: str | Path | Sequence[str | Path], **options: Any) -> PairSource:
    """The pairs that a path, or several, hold; what it is is found out from its name and its content.

    Args:
        path: a file, a folder, a name with a brace range for tar shards, or a list of those.
        options: see :class:`SourceOptions`.

    Raises:
        InputError: nothing there, or nothing that is known; or it cannot be read as what it is.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    require(bool(paths), "no data: an empty list of paths")
    wanted = SourceOptions(**options)
    if len(paths) > 1 and all(_is_shards(str(each)) for each in paths):
        return _open_shards([str(each) for each in paths], wanted)
    sources = [_open_one(str(each), wanted) for each in paths]
    if len(sources) == 1:
        return sources[0]
    roots = {str(getattr(source, "root", number)) for number, source in enumerate(sources)}
    from datamodules.pairs.mixture import Concatenated

    return Concatenated(sources, apart=len(roots) > 1)


def _is_shards(name: str) -> bool:
    if "://" in name and name.endswith("/"):  # a store's folder; nothing else is read from one
        return True
    return re.search(r"\.tar(\.gz|\.bz2|\.xz|\.zst)?$", name, re.IGNORECASE) is not None


def _open_shards(names: list[str], options: SourceOptions) -> PairSource:
    from datamodules.shards.pairs import TarPairs

    options.no_split(names[0])
    require(options.image_column is None, f"{names[0]}: shards have no columns; leave image_column out")
    return TarPairs(names, options.shards, options.caption_column, options.group_column, options.on_error)


def _open_one(name: str, options: SourceOptions) -> PairSource:
    if _is_shards(name):
        return _open_shards([name], options)
    require("://" not in name, f"{name}: only tar shards are read from an address; download it first")
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, options)
    if not path.exists():
        raise InputError(f"{name}: no such file or folder; data may be {TAKEN}")
    from datamodules.pairs import coco, parquet, text_table

    suffix = path.suffix.lower()
    if suffix == ".parquet":
        options.no_split(path)
        return parquet.open_parquet([path], options)
    if suffix == ".json":
        return coco.open_json(path, options)
    if suffix in (*DELIMITED, *JSON_LINES):
        return text_table.open_table(path, options)
    raise InputError(f"{name}: {suffix or 'a name without an ending'} is not known; data may be {TAKEN}")


def _open_folder(folder: Path, options: SourceOptions) -> PairSource:
    from datamodules.pairs import folder as images
    from datamodules.pairs import parquet, saved, text_table

    if saved.is_saved(folder):
        return saved.open_saved(folder, options)
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    tables = [name for name in entries if Path(name).stem.lower() == "metadata"]  # Hugging Face's "imagefolder"
    for name in tables:
        if Path(name).suffix.lower() in (".csv", *JSON_LINES):
            return text_table.open_table(folder / name, options)
        if Path(name).suffix.lower() == ".parquet":
            return parquet.open_parquet([folder / name], options)
    if any(map(_is_shards, entries)):
        return _open_shards([str(folder)], options)
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    described = all(file.with_suffix("").is_dir() for file in files)  # img2dataset: 00000.parquet tells of 00000/
    if files and not described:
        return parquet.open_parquet(parquet.of_split(folder, files, options), options)
    options.no_split(folder)
    options.no_columns(folder)
    return images.FolderPairs(folder)
