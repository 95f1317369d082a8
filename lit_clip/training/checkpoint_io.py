"""Checkpoint files that are complete or absent, and how to find the newest one."""

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
    """Write a checkpoint beside its final path and rename it when it is on the disk.

    Lightning's own builds the file in memory, writes it to the system's temporary folder, which may be another disk,
    and is silent when it may not write.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            InputError: it cannot be written; an existing file is left unchanged.
        """
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
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            if isinstance(error.__context__, KeyboardInterrupt):  # and when it is interrupted
                raise error.__context__ from None
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"{whole}: the checkpoint cannot be written ({reason}); the previous one is kept"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def put_in_place(part: Path, whole: Path) -> None:
    """Rename a written checkpoint to its final path if it is complete; a sharded one is a folder.

    Raises:
        InputError: it is not complete.
    """
    if not (part.is_dir() or zipfile.is_zipfile(part)):  # the end of the file is written last
        raise InputError(
            f"{whole}: the checkpoint could not be written; check the free space and the folder's permissions"
        )
    if whole.is_dir() and not whole.is_symlink():
        shutil.rmtree(whole)
    os.replace(part, whole)


def newest_checkpoint(places: Iterable[Path]) -> Path | None:
    """Return the complete checkpoint with the most optimiser steps in the folder that was written to last.

    Incomplete files, other files, and checkpoints that hold weights only are ignored.

    Args:
        places: folders, searched at any depth, and files.
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
        checkpoint = torch.load(
            path, map_location="cpu", mmap=True, weights_only=True
        )  # memory-mapped: no tensor is read
        return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None
    except Exception:  # whatever a damaged or foreign file raises: it cannot be resumed from
        return None


def save_whole(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint beside its final path, check that it is complete, and rename it; called on every rank.

    Works with any ``CheckpointIO``: Lightning's own is silent when it may not write, see :class:`WholeCheckpointIO`.

    Raises:
        InputError: on the rank that writes, if the file could not be written.
    """
    part = path.with_name(f"{path.name}.part")
    if trainer.is_global_zero:
        part.unlink(missing_ok=True)
    trainer.save_checkpoint(part)
    if trainer.is_global_zero:
        put_in_place(part, path)
    trainer.strategy.barrier("save_whole")
