"""Detect the format of a source of pairs, and open it, also as the training data of a command."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse import ArgumentError

from lit_clip.errors import BadSample, InputError, require, similar_file
from lit_clip.tools.class_paths import short_names
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import stamp_of_files
from lit_clip.tools.images import SUFFIXES as IMAGES
from lit_clip.tools.images import OnError
from lit_clip.tools.messages import OptionParser, one_line
from lit_clip.tools.reading import check_is_file, reading
from .loading.store import is_remote
from .pairs.kept import digest_of_kept, kept_pairs
from .pairs.mixture import Concatenated
from .pairs.source import DELIMITED, JSON_LINES, Classes, PairSource, Row, SourceOptions
from .pairs.text_table import open_table

if TYPE_CHECKING:
    from .pairs.findings import DataOptions

Opener = Callable[[Path, SourceOptions], PairSource]


def _open_json(path: Path, options: SourceOptions) -> PairSource:
    from .pairs.coco import open_json

    return open_json(path, options)


def _open_parquet(path: Path, options: SourceOptions) -> PairSource:
    from .pairs.parquet import open_parquet

    options.refuse_split(path)
    return open_parquet([path], options)


FILES: dict[str, Opener] = {  # by suffix
    **dict.fromkeys((*DELIMITED, *JSON_LINES), open_table),
    ".json": _open_json,
    ".parquet": _open_parquet,
}
REMOTE = (*DELIMITED, *JSON_LINES, ".parquet")  # suffixes of tables that are read from a store
SUPPORTED = (
    f"a table ({', '.join(FILES)}), COCO's or Karpathy's JSON, a folder of images with a .txt beside each, a folder of "
    "parquet files, a data set saved by Hugging Face's datasets, one of its hub (owner/name), tar shards, or a source "
    "of your own ({class_path: my_source.MyPairs})"
)


def open_source(path: str | Path | Sequence[str | Path] | Mapping[str, Any] | PairSource, **options: Any) -> PairSource:
    """Return the pairs in one or several paths; the format is detected from names and contents.

    A path is a file, a folder or a name with a brace range for tar shards. A source is an object, or ``class_path`` and
    ``init_args``, also in braces as one text. The options are the fields of :class:`SourceOptions`.
    """
    if isinstance(path, PairSource):
        return path
    if isinstance(path, Mapping):
        return _made(path)
    paths = [path] if isinstance(path, str | Path) else list(path)
    require(bool(paths), "no data: an empty list of paths")
    source_options = SourceOptions(**options)
    if len(paths) > 1 and all(_is_shards(str(each)) for each in paths):
        return _open_shards([str(each) for each in paths], source_options)
    sources = [_open_path(str(each), source_options) for each in paths]
    if len(sources) == 1:
        return sources[0]
    roots = {str(getattr(source, "root", None) or number) for number, source in enumerate(sources)}
    return Concatenated(sources, distinct_keys=len(roots) > 1)


@short_names()
def _made(description: Mapping[str, Any] | str) -> PairSource:
    parser = OptionParser(exit_on_error=False)
    parser.add_argument("--data", type=PairSource)
    try:
        if isinstance(description, str):
            parsed = parser.parse_args([f"--data={description}"])
        else:
            parsed = parser.parse_object({"data": dict(description)})
        return parser.instantiate(parsed).data
    except ArgumentError as error:
        raise InputError(one_line(error)) from error


def stamp_of_data(data: Sequence[str], without: Sequence[Path] = ()) -> str:
    """Return a cache key of data from the names, times and sizes of files.

    Files of ``without`` do not count, such as the caller's own output, nor do indexes of shards: several jobs write
    them at once.
    """
    from .shards.index import INDEX_SUFFIX

    outputs = [os.path.abspath(path) for path in without]
    stamps = []
    for name in data:
        path = Path(name).expanduser()
        files = [file for file in path.rglob("*") if file.is_file() and os.path.abspath(file) not in outputs]
        names = {file: f"/{file.relative_to(path)}" for file in files}
        counted = [file for file, name in names.items() if "/." not in name and not name.endswith(INDEX_SUFFIX)]
        stamps.append(stamp_of_files([path] if path.is_file() else counted))
    return repr((list(data), stamps))


def holds_pairs(name: str) -> bool:
    """Return whether a path is a source of pairs, such as a table or shards, and not images."""
    from .pairs.remote import parse_hub_name

    path = Path(name).expanduser()
    if is_remote(name) or _is_shards(name) or path.suffix.lower() in FILES:
        return True
    if path.is_dir():
        return _format_of(path) is not None
    return not path.exists() and path.suffix.lower() not in IMAGES and parse_hub_name(name) is not None


def _is_shards(name: str) -> bool:
    if "://" in name and name.endswith("/"):  # a folder in a store; only shards are read from one
        return True
    return re.search(r"\.tar(\.gz|\.bz2|\.xz|\.zst)?$", name, re.IGNORECASE) is not None


def _open_shards(names: list[str], options: SourceOptions) -> PairSource:
    from .shards.pairs import TarPairs

    options.refuse_split(names[0])
    options.refuse_classes(names[0])
    options.refuse_columns(names[0], ("image", "negative"), "shards have no such column")
    return TarPairs(names, options.shards, options.columns, options.on_error)


def _open_path(name: str, options: SourceOptions) -> PairSource:
    if name.startswith("{") and "class_path" in name and not os.path.exists(name):  # a file may have any name
        return _made(name)
    if not Path(name).expanduser().is_dir():
        options.refuse_classes(name)
    if _is_shards(name):
        return _open_shards([name], options)
    if is_remote(name):
        from .pairs.remote import open_remote_table, url_suffix

        suffix = url_suffix(name)
        readable = f"only tables ({', '.join(REMOTE)}) and tar shards are read from a URL"
        require(suffix in REMOTE, f"{name}: {readable}; download it")
        return open_remote_table(name, options, FILES[suffix])
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike the method, false for a name that is too long
        return _open_folder(path, options)
    check_is_file(path)
    suffix = path.suffix.lower()
    exists = os.path.exists(path)
    if not exists:
        from .pairs.remote import open_hub_data, parse_hub_name

        parts = None if suffix in (*FILES, *IMAGES) else parse_hub_name(name)
        if parts is not None:
            return open_hub_data(name, parts, options)
        instead = similar_file(path) if suffix in FILES else f"; data may be {SUPPORTED}"
        raise InputError(f"{name[:1000]}: no such file or folder{instead}")
    require(suffix in FILES, f"{name}: unknown format {suffix or '(no suffix)'}; data may be {SUPPORTED}")
    return FILES[suffix](path, options)


def _open_folder(folder: Path, options: SourceOptions) -> PairSource:
    from .pairs.folder import FolderPairs, open_class_folders

    if options.classes != Classes():
        return open_class_folders(folder, options)
    open_it = _format_of(folder)
    if open_it is not None:
        return open_it(options)
    options.refuse_split(folder)
    options.refuse_columns(folder)
    return FolderPairs(folder, options.option_prefix)


def _format_of(folder: Path) -> Callable[[SourceOptions], PairSource] | None:
    """Return the opener of the first format found in a folder; None for a folder of images and texts."""
    from .pairs import parquet, stored

    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return partial(stored.open_saved, folder)
    with reading(folder, "folder"):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(map(_is_shards, names)):
        return partial(_open_shards, [str(folder)])
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    files = [file for file in files if not parquet.holds_features(file)]
    from_img2dataset = all(file.with_suffix("").is_dir() for file in files)  # its 00000.parquet describes 00000/
    if files and not from_img2dataset:
        return lambda options: parquet.open_parquet(parquet.files_of_split(folder, files, options), options)
    return None


class Opened(NamedTuple):
    """Training data before and after applying tables of decisions."""

    options: "tuple[DataOptions, Classes]"
    every: PairSource
    pairs: PairSource  # without what a table of ``--keep`` drops

    def stamp(self, *outputs: Path) -> str:
        """Return a cache key of the pairs; it does not change with the command's own outputs."""
        files = stamp_of_data(self.options[0].data, outputs)
        return repr((self.options, len(self.every), self.every.versions, files, digest_of_kept(self.pairs)))


def open_data(
    options: "DataOptions",
    on_error: OnError = "skip",
    classes: Classes = Classes(),  # noqa: B008  # immutable
    keep: str | Sequence[str] | None = None,
    default_split: str | None = None,
) -> Opened:
    """Open and prepare training data, and report the pairs left out."""
    require(bool(options.data), "no data: name a table, a folder or shards before the options")
    fields = {"columns": options.columns, "split": options.split, "classes": classes, "on_error": on_error}
    every = open_source(options.data, **fields, default_split=default_split, option_prefix="--")
    every.prepare()
    require(len(every) > 0, f"{', '.join(options.data)}: has no pairs")
    if every.left_out.counts:
        stderr().print(f"{every.left_out} left out")
    return Opened((options, classes), every, every if keep is None else kept_pairs(every, keep, "--keep"))


def readable_rows(source: PairSource, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """Yield the number of each row with readable texts, and the row without its image.

    For the others raise an error, or name them and leave them out.
    """
    for number in range(len(source)):
        try:
            row = source.row(number)._replace(image=None)
        except BadSample as error:
            if on_error == "error":
                raise
            stderr().print(f"skipped: {error}")
        else:
            yield number, row
