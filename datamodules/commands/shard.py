"""``lit-clip shard``: any source of pairs as tar shards in img2dataset's layout, with their indexes."""

from pathlib import Path

from datamodules.loading.bad_samples import OnError
from datamodules.open_source import open_source
from datamodules.pairs.source import PairSource
from datamodules.shards.writing import PLAN, ShardPlan, _keep_plan, _plan, _write_all
from lit_clip.errors import InputError, require
from lit_clip.tools.console import stderr


def shard(
    data: str,
    output: str,
    *,
    shard_size: int = 10_000,
    workers: int = 8,
    root: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    split: str | None = None,
    on_error: OnError = "error",
) -> None:
    """Write pairs as tar shards, as img2dataset does, with an index of each.

    Images are copied byte for byte, after they have been decoded once to see that they can be. A shard gets its name
    when it is whole; the same command given again keeps those and writes the others.

    Args:
        data: a table, a folder of images with captions beside them, or whatever else training takes.
        output: a folder, for nothing else.
        shard_size: pairs of a shard.
        workers: processes.
        root: where relative image paths start.
        image_column: of a table; found out if not given.
        caption_column: likewise.
        group_column: of a table; kept in the shards' .json as group.
        split: of data that come in splits.
        on_error: what a pair that cannot be read does; skip lists it beside its shard, in a .skipped.jsonl.
    """
    from filelock import FileLock, Timeout

    require(shard_size >= 1, f"--shard_size {shard_size} must be at least 1")
    options = {
        "root": root,
        "image_column": image_column,
        "caption_column": caption_column,
        "group_column": group_column,
        "split": split,
    }
    folder = Path(output)
    require(not folder.exists() or folder.is_dir(), f"{folder}: there is a file of that name; give a folder")
    source = open_source(data, **options, typed="--", on_error=on_error)
    source.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _keep_plan(folder / PLAN, _plan(data, source, shard_size, options))
            counts = _write_all(ShardPlan(source, folder, shard_size, on_error), workers)
    except Timeout as error:
        raise InputError(f"{folder}: another lit-clip shard is writing there") from error
    _report(source, folder, counts)


def _report(source: PairSource, folder: Path, counts: list[tuple[int, int]]) -> None:
    pairs, skipped = (sum(column) for column in zip(*counts, strict=True))
    if not pairs:
        raise InputError(f"{folder}: none of {skipped} pairs could be read; {folder}/*.skipped.jsonl say why")
    note = f", {skipped} skipped ({folder}/*.skipped.jsonl)" if skipped else ""
    left_out = f", left out: {source.left_out}" if str(source.left_out) else ""
    stderr().print(f"{folder}: {pairs} pairs in {len(counts)} shards{note}{left_out}", markup=False)
