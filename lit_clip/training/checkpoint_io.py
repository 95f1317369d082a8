"""Checkpoints that are whole or not there, and the newest of them."""

import os
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from lit_clip.errors import InputError


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name beside its own, and gives it its name when it is on the disk.

    Lightning's own builds the file in memory first, writes it to the system's temporary folder, which may be another
    disk, and says nothing where it may not write.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raise :class:`InputError` where it cannot be written; a file of that name is then as it was."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(path)
        part = whole.with_name(f".{whole.name}.part")
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(part, whole)
        except (OSError, RuntimeError) as error:  # torch's writer raises the second on a full disk
            if isinstance(error.__context__, KeyboardInterrupt):  # and where it was interrupted
                raise error.__context__ from None
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"{whole}: the checkpoint cannot be written ({reason}); the one before is kept") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def put_in_place(part: Path, whole: Path) -> None:
    """Give a written checkpoint its name, if it is whole; a sharded one is a folder.

    Raises:
        InputError: it is not.
    """
    if not (part.is_dir() or zipfile.is_zipfile(part)):  # a file's end is written last
        raise InputError(f"{whole}: could not be written; is the disk full, or the folder not yours?")
    if whole.is_dir() and not whole.is_symlink():
        shutil.rmtree(whole)
    os.replace(part, whole)


def newest_checkpoint(places: Iterable[Path]) -> Path | None:
    """Of the folder that was written to last, the whole checkpoint of the most optimiser steps.

    Files that are not whole, not checkpoints, or hold weights alone are passed over.

    Args:
        places: folders, which are searched at any depth, and files.
    """
    files = {file.resolve() for place in places for file in ([place] if place.is_file() else place.rglob("*.ckpt"))}
    found = [(step, file.stat().st_mtime, file) for file in files if (step := _steps(file)) is not None]
    if not found:
        return None
    last = max(found, key=lambda each: each[1])[2].parent
    return max(each for each in found if each[2].parent == last)[2]


def _steps(path: Path) -> int | None:
    try:
        if not zipfile.is_zipfile(path):
            return None
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # mapped: no tensor is read
        return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None
    except Exception:  # whatever a damaged or foreign file raises: it is no checkpoint to go on from
        return None


def save_whole(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint under another name, see that it is whole, and only then give it its name. On every rank.

    Whatever writes checkpoints: Lightning's own way says nothing where it may not write, see
    :class:`lit_clip.training.checkpoint_io.WholeCheckpointIO`.

    Raises:
        InputError: on the rank that writes, if it could not.
    """
    part = path.with_name(f"{path.name}.part")
    if trainer.is_global_zero:
        part.unlink(missing_ok=True)
    trainer.save_checkpoint(part)
    if trainer.is_global_zero:
        put_in_place(part, path)
    trainer.strategy.barrier("save_whole")
