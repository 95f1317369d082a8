"""Checkpoint files that are complete or absent, and the search for the newest one."""

import io
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils._pytree import tree_map

from lit_clip import distributed
from lit_clip.errors import InputError
from lit_clip.tools.atomic import draft_of, exchange, remove
from lit_clip.tools.hashing import hex_digest, sha256_of_file
from lit_clip.tools.messages import LOST_WORKER
from lit_clip.tools.reading import reading
from lit_clip.tools.sharded_files import INDEX, is_sharded
from lit_clip.tools.weight_files import load_mapped, read_mapped, read_sharded
from lit_clip.training.lightning.resume_checks import check_restorable, restore_in_one_line

CLOCKS_DIFFER = 60.0  # seconds that the clocks of machines that share a disk may

COPIED = {"state_dict", "optimizer_states", "current_model_state"}  # entries that are copied when they are restored


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final path, then rename it once it is on disk; Lightning may fail silently."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(path)
        part, handled = draft_of(whole), sys.exc_info()[1]
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            write_plain(checkpoint, part, whole)
            put_in_place(part, whole)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            first = _first(error, handled)
            # And when a signal's handler interrupts it, as torch's does when a data worker is lost.
            if isinstance(first, KeyboardInterrupt) or LOST_WORKER.search(str(first)):
                raise first from None
            reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
            raise InputError(
                f"{whole}: the checkpoint cannot be written ({reason}); the previous one is kept"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_plain(checkpoint: Mapping[str, Any], part: Path, whole: Path) -> None:
    """Write tensors and plain values to disk as ``part``: the checkpoint ``whole``, or a file in it."""
    with part.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    _check_plain(checkpoint, part, whole)


def write_whole_files(plugins: list[Any]) -> None:
    """Make a trainer's plugins write through :class:`WholeCheckpointIO`, unless they have another kind."""
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeCheckpointIO())
    for plugin in plugins:
        if isinstance(plugin, _WrappingCheckpointIO):  # such as AsyncCheckpointIO
            plugin.checkpoint_io = WholeCheckpointIO()  # has no effect if it wraps one already


def remove_after_writing(plugin: Any) -> None:
    """Make ``AsyncCheckpointIO`` remove a checkpoint only after all earlier ones are on disk."""
    for each in wrapped(plugin):
        if isinstance(each, AsyncCheckpointIO):
            each.remove_checkpoint = partial(_remove_in_turn, each)


def wrapped(plugin: Any) -> Iterator[Any]:
    """Yield a ``CheckpointIO`` and all that it wraps."""
    while plugin is not None:
        yield plugin
        plugin = getattr(plugin, "checkpoint_io", None)


def _remove_in_turn(plugin: AsyncCheckpointIO, path: Any) -> None:
    def remove() -> None:
        if plugin._error is None:  # otherwise the next call raises it
            try:
                type(plugin).remove_checkpoint(plugin, path)
            except OSError as error:
                plugin._error = error

    plugin._ensure_setup()
    assert plugin._executor is not None
    plugin._executor.submit(remove)


def _first(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the error that caused the others, but not one that was already being handled, such as a signal's."""
    while (before := error.__cause__ or error.__context__) and before is not handled:
        error = before
    return error


def _check_plain(checkpoint: Mapping[str, Any], part: Path, whole: Path) -> None:
    """Refuse a checkpoint with objects other than tensors and plain values: no command would open it."""
    if not zipfile.is_zipfile(part) or not (found := get_unsafe_globals_in_checkpoint(part)):
        return
    entries = [*checkpoint.get("callbacks", {}).items(), *checkpoint.items()]
    name = next((name for name, value in entries if _unsafe(value)), "")
    kept = "; the previous checkpoint is kept" if whole.exists() else ""
    raise InputError(
        f"{whole}: the state of {name} holds {found[0]}; have its state_dict return tensors and plain values, such as "
        f"array.tolist(){kept}"
    )


def _unsafe(value: Any) -> list[str]:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return get_unsafe_globals_in_checkpoint(file)


def put_in_place(part: Path, whole: Path) -> None:
    """Rename a written checkpoint to its final path if it is complete; a sharded one is a folder."""
    if not (part.is_dir() or zipfile.is_zipfile(part)):  # the end of the file is written last
        raise InputError(
            f"{whole}: the checkpoint could not be written; check the free space and the folder's permissions"
        )
    if whole.is_dir() or part.is_dir():  # no file or link gives way to a folder, and no folder with files to anything
        former = draft_of(whole)
        if exchange(part, whole):
            former = part
        else:
            with suppress(FileNotFoundError):
                whole.rename(former)
            part.rename(whole)
        remove(former)
    else:
        os.replace(part, whole)


def newest_checkpoint(
    places: Iterable[Path], differing: Callable[[Path, Mapping[str, Any]], Sequence[str]] = lambda file, checkpoint: ()
) -> Path | None:
    """Return the complete checkpoint with the most optimiser steps, in the most recently written folder.

    Folders are searched at any depth; checkpoints that hold weights only are ignored. ``differing`` returns in which
    settings a file's run had another configuration: such files are passed over, and named if another one is found.
    """
    files = {file.resolve() for place in places for file in _candidates(place)}
    found = {file: checkpoint for file in files if (checkpoint := _resumable(file)) is not None}
    others = {file: names for file, checkpoint in found.items() if (names := differing(file, checkpoint))}
    _date_until_now(found)
    steps = [(int(found[file]["global_step"]), file.stat().st_mtime, file) for file in found.keys() - others.keys()]
    if not steps:
        return None
    last = max(steps, key=lambda each: each[1])[2].parent
    step, written, newest = max(each for each in steps if each[2].parent == last)
    named = [each for each in steps if each[0] == step and each[2] == last / "last.ckpt"]
    newest = named[0][2] if named else newest  # best.ckpt of the same step is as good, but looks older
    for file in sorted(filter(Path.exists, files)):  # a link may lead to a file that was removed
        if file.stat().st_mtime > written and not _is_whole(file):
            rank_zero_warn(f"{file}: incomplete or damaged; {newest} is the newest complete checkpoint")
    newer = {file: names for file, names in others.items() if file.stat().st_mtime > written}
    if newer:
        rank_zero_warn(f"{passed_over(newer)}. To resume from it, give its path to --ckpt_path")
    return newest


def _candidates(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() or is_sharded(place) else place.rglob("*.ckpt")


def _is_whole(path: Path) -> bool:
    """Return whether a file is a complete archive; a folder is, unless it is an incomplete sharded checkpoint."""
    if not is_sharded(path):
        return path.is_dir() or zipfile.is_zipfile(path)
    with suppress(InputError):
        return bool(read_mapped(path))
    return False


def passed_over(others: Mapping[Path, Sequence[str]]) -> str:
    """Return a text that names the newest checkpoint of another configuration, and the settings that differ."""
    newest = max(others, key=os.path.getmtime)
    more = f" (and {len(others) - 1} others)" if len(others) > 2 else " (and another)" if len(others) == 2 else ""
    return f"{newest}: passed over{more}; its run had another configuration ({', '.join(others[newest])})"


@rank_zero_only
def _date_until_now(files: Iterable[Path]) -> None:
    """Change dates in the future to now, in order: a clock was wrong, and later files must be newer."""
    now = time.time()
    ahead = sorted((file for file in files if file.stat().st_mtime > now + CLOCKS_DIFFER), key=os.path.getmtime)
    if ahead:
        rank_zero_warn(f"{ahead[-1]}: dated in the future, so a clock was wrong; such checkpoints are dated now")
    for number, file in enumerate(ahead):
        with suppress(OSError):  # another user's
            os.utime(file, (now, now + number * 1e-3))


def checkpoint_step(path: Path) -> int | None:
    """Return a checkpoint's optimiser steps; None for other files, incomplete ones, and weights alone."""
    checkpoint = _resumable(path)
    return None if checkpoint is None else int(checkpoint["global_step"])


def _resumable(path: Path) -> dict[str, Any] | None:
    try:
        if not (zipfile.is_zipfile(path) or is_sharded(path)):
            return None
        checkpoint = load_mapped(path)
        int(checkpoint["global_step"])
        return checkpoint if "optimizer_states" in checkpoint else None
    except pickle.UnpicklingError:
        rank_zero_warn(f"{path}: passed over, as it holds more than tensors and plain values")
        return None
    except Exception:  # any error of a damaged or foreign file, which cannot be resumed from
        return None


def load_the_same_checkpoint(trainer: Trainer) -> None:
    """Make the ranks compare their checkpoints before loading; called on every rank in ``setup``.

    Each rank looks on its own disk; one that finds another checkpoint, or none, would train on alone while the others
    wait for it. Lightning has no hook that ranks without a checkpoint reach, too.
    """
    connector: Any = trainer._checkpoint_connector
    *_, plugin = wrapped(trainer.strategy.checkpoint_io)
    plugin.load_checkpoint = partial(_load, plugin)

    def resume_start(path: Any = None, weights_only: bool | None = None) -> None:
        if trainer.world_size > 1:
            _check_the_same(path)
        # Lightning's default for an address would run a program that it holds.
        weights_only = True if weights_only is None else weights_only
        with reading(path, "checkpoint") if path else nullcontext():
            type(connector).resume_start(connector, path, weights_only)
        if path:
            check_restorable(checkpoint := connector._loaded_checkpoint, trainer, path)
            for name in checkpoint.keys() - COPIED:  # of a mapped file, what stays would change or crash with the file
                checkpoint[name] = tree_map(_own, checkpoint[name])

    connector.resume_start = resume_start
    restore_in_one_line(connector)


def _load(plugin: Any, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a whole or sharded checkpoint; a whole one is mapped, so that a machine's ranks read it once."""
    if is_sharded(path):
        return read_sharded(Path(path))
    lightnings = type(plugin).load_checkpoint is TorchCheckpointIO.load_checkpoint
    if weights_only and lightnings and "://" not in str(path) and zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return type(plugin).load_checkpoint(plugin, path, weights_only=weights_only)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _check_the_same(path: Any) -> None:
    first, *others = distributed.gather_objects([(str(path or "none"), _fingerprint(path))])
    for rank, other in enumerate(others, start=1):
        if other[1] != first[1]:
            raise InputError(
                f"--ckpt_path: ranks would resume from different checkpoints: {first[0]} ({first[1][0]}) on rank 0 and "
                f"{other[0]} ({other[1][0]}) on rank {rank}; put the same file on every machine, or on a disk that "
                "all of them share"
            )


def _fingerprint(path: Any) -> tuple[str, str]:
    """Return a checkpoint's description in words, and a digest of the checksums of its contents."""
    if not path:
        return "from the beginning", ""
    if "://" in str(path):
        return "an address", str(path)
    try:
        if is_sharded(path):  # of which each file names the checkpoint
            return f"step {int(read_mapped(Path(path))['global_step'])}", sha256_of_file(Path(path, INDEX))
        with zipfile.ZipFile(path) as file:
            members = [(member.filename.partition("/")[2], member.CRC) for member in file.infolist()]
        return f"step {checkpoint_step(Path(path))}", hex_digest([sorted(members)])
    except FileNotFoundError:
        return "no such file", ""
    except Exception:  # damaged, or another program's folder: loading it says so
        return "not one whole file", ""


def save_whole(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint beside its final path, check that it is complete, then rename it; called on every rank.

    Works with any ``CheckpointIO``: Lightning's own is silent when it may not write, see :class:`WholeCheckpointIO`.
    """
    part = trainer.strategy.broadcast(draft_of(path))
    trainer.save_checkpoint(part)
    for plugin in wrapped(trainer.strategy.checkpoint_io):
        plugin.teardown()  # waits for AsyncCheckpointIO's thread, which starts again when it is next needed
    if trainer.is_global_zero:
        put_in_place(part, path)
    trainer.strategy.barrier("save_whole")
