"""``lit-clip shard``: write any source of pairs as indexed tar shards in img2dataset's layout."""

from pathlib import Path

from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import Share, claimed, make_folder
from lit_clip.tools.console import stderr
from lit_clip.tools.images import OnError
from ..open_source import open_data
from ..pairs.findings import DataOptions
from ..pairs.kept import digest_of_kept
from ..pairs.source import COLUMNS, Columns
from ..shards.writing import MANIFEST, ShardWriter, keep_manifest, manifest_of, write_shards


def shard(
    data: str,
    output: str,
    *,
    shard_size: int = 10_000,
    resize: int | None = None,
    num_workers: int = 8,
    columns: Columns = Columns(),  # noqa: B008  # immutable
    split: str | None = None,
    keep: str | list[str] | None = None,
    on_error: OnError = "error",
    share: str | None = None,
) -> None:
    """Write pairs as tar shards in img2dataset's layout, each with an index.

    Images are copied byte for byte, after a check that they can be decoded; only ``--resize`` changes them. A shard
    gets its name when it is complete; the same command run again keeps the complete shards and writes the others.

    Args:
        data: a table, a folder of images with captions beside them, or anything else that training accepts.
        output: an empty folder, or one that the same command began to fill.
        shard_size: pairs in a shard.
        resize: short side in pixels; larger images are resized to it, as JPEGs of quality 95.
        num_workers: processes.
        columns: of a table; a group is written to the shards' .json as group.
        split: of data that come in splits.
        keep: a table of lit-clip inspect, overlap or score, or several; only the pairs that all keep are written.
        on_error: for pairs that cannot be read; skip lists them beside their shard in a .skipped.jsonl.
        share: i/n, such as 3/16: write the third sixteenth of the shards, beside other jobs; when all have ended, the
            same command without it counts what is there, and writes what is missing.
    """
    require(shard_size >= 1, f"--shard_size {shard_size} must be at least 1")
    require(resize is None or resize >= 1, f"--resize {resize} must be at least 1")
    for name in ("negative", "weight", "title"):
        unused = getattr(columns, name) is None
        require(unused, f"--columns.{name}: shards hold captions and groups alone; train on the table itself")
    folder = Path(output)
    require(not folder.exists() or folder.is_dir(), f"{folder}: is a file; give a folder")
    opened = open_data(DataOptions([data], columns, split), on_error, keep=keep)
    source = opened.pairs
    options = {f"{name}_column": getattr(columns, name) for name in COLUMNS} | {"root": columns.root, "split": split}
    if keep is not None:
        options["keep"] = digest_of_kept(source)
    writer = ShardWriter(source, folder, shard_size, on_error, resize, Share.typed(share))
    make_folder(folder, "--output")
    with claimed(folder, share=writer.share):
        keep_manifest(folder / MANIFEST, manifest_of(data, source, shard_size, resize, options))
        counts = write_shards(writer, num_workers)
    if share is not None:
        stderr().print(writer.share.finished(folder))
        return
    if not counts.pairs:
        raise InputError(f"{folder}: none of {counts.skipped} pairs could be read; see {folder}/*.skipped.jsonl")
    note = f", {counts.skipped} skipped ({folder}/*.skipped.jsonl)" if counts.skipped else ""
    before, after = (f"{number / 1e6:,.1f}" for number in (counts.bytes_before, counts.bytes_after))
    resized = f", {counts.resized} images resized now, from {before} to {after} MB" if counts.resized else ""
    stderr().print(f"{folder}: {counts.pairs} pairs in {len(writer.numbers)} shards{resized}{note}")
