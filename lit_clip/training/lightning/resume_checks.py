"""Check the states of loops, callbacks, optimisers and schedules in a checkpoint before Lightning uses them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.tools.parts import Description, class_paths, setting_changes
from lit_clip.tools.reading import naming, reason
from lit_clip.tools.untrusted import Count, convert, entries, shortened
from lit_clip.tools.weight_files import check_tensors_within, load_mapped
from lit_clip.training.lightning.run_folder import newest_config, shown_path
from lit_clip.weights.checkpoints import RESUMED

# States of an optimiser that are of their parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
SAVER = entries({**dict.fromkeys(PATHS, str), "best_k_models": dict[str, object], "dirpath": str | None})
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


def check_same_parts(ours: Mapping[str, Description], saved: Mapping[str, Description], name: str) -> None:
    """Refuse to resume with another optimiser or loss than the checkpoint's; report other changed settings."""
    config = newest_config(Path(name).parent.parent)
    how = f"--config {shown_path(config)}" if config else "the configuration, or in Python the arguments, of its run"
    changes = []
    for part, description in ((name, each) for name, each in ours.items() if each != saved[name]):
        there, here = (" of ".join(class_paths(each)) for each in (saved[part], description))
        require(
            there == here or part not in ("optimizer", "loss"),
            f"{name}: was trained with model.{part} {there}, and this run has {here}; resume with {how}, or start from "
            f"its weights with model.pretrained {name}",
        )
        differing = setting_changes(description, saved[part]) if there == here else [f"{here} (checkpoint: {there})"]
        changes += [f"model.{part} {change}" for change in differing]
    if changes:
        rank_zero_info(f"{name}: resumes with {', '.join(changes)}; {how} has the checkpoint's settings")


def check_restorable(checkpoint: Any, trainer: Trainer, name: str) -> None:
    """Check what a trainer will restore, before it begins."""
    require(isinstance(checkpoint, Mapping), f"{name}: not a checkpoint (a {type(checkpoint).__name__})")
    with naming(name):
        check_tensors_within(checkpoint)
        convert(checkpoint, RESUMED)
        for kind, state in (checkpoint.get("loops") or {}).items():
            fresh = getattr(trainer, kind).state_dict() if kind in LOOPS else {}
            # Versions of Lightning have different loops; a loop of other counts is damaged.
            counts = {each: _counts(value) for each, value in fresh.items()}
            convert(state, entries(counts), f"loops.{kind}")
    mine = {each.state_key: each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)}
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if isinstance(state, dict):  # otherwise its callback refuses it
            _settle_paths(state, mine, key, f"{name}: callbacks.{key}")


def _counts(fresh: Any) -> Any:
    """Return the type of a loop's counts, from the counts of a loop that has not begun."""
    if isinstance(fresh, Mapping):
        return entries({name: _counts(value) for name, value in fresh.items()}, total=True)
    return {int: Count, bool: bool}.get(type(fresh), Any)


def _settle_paths(state: dict[str, Any], savers: Mapping[str, ModelCheckpoint], key: str, where: str) -> None:
    """Check the files that :class:`ModelCheckpoint` may delete later: only its own, in its folder.

    The best model of another folder stays the best until there is a better one: a resumed run is one run.
    """
    folders = {str(each.dirpath): each.FILE_EXTENSION for each in savers.values()}
    convert(state, SAVER, where)
    # Lightning takes the others from a state without a folder, or with this run's.
    foreign = state.get("dirpath") is not None and state["dirpath"] not in folders
    others = (*(state.get(name) for name in PATHS[1:]), *state.get("best_k_models", {}))
    for path in (state.get("best_model_path"), *(() if foreign else others)):
        if not path:
            continue
        pure = PurePath(path)
        ours = any(path.startswith(f"{folder.rstrip('/')}/") and path.endswith(folders[folder]) for folder in folders)
        # Of local files in other folders Lightning deletes none, but it does not look for `..`.
        safe = ".." not in pure.parts and (ours or (foreign and "://" not in path and "::" not in path))
        require(safe, f"{where}: {shortened(path)} is no checkpoint in the folder of this run, which may delete it")
    best, saver = state.get("best_model_path"), savers.get(key)
    score = _score(Path(best), key) if best and saver is not None and saver.monitor else None
    if saver is not None and foreign and score is not None:
        top = {"best_k_models": {best: score}, "kth_best_model_path": best, "kth_value": score}
        state |= {"dirpath": saver.dirpath, "last_model_path": "", "best_model_score": score, **top}


def _score(path: Path, key: str) -> Tensor | None:
    """Return the score of a best model from its file, as another saver may have written its checkpoint earlier."""
    with suppress(Exception):  # it is gone, or no checkpoint
        score = load_mapped(path)["callbacks"][key]["best_model_score"]
        return score.clone() if isinstance(score, Tensor) and score.numel() == 1 and bool(score.isfinite()) else None
    return None


def evaluate_as_given(trainer: Trainer) -> None:
    """Make ``validate``, ``test`` and ``predict`` use the given model.

    Under SLURM Lightning would load the checkpoint of a requeued training run that it finds in the folder.
    """
    connector: Any = trainer._checkpoint_connector
    parse = connector._parse_ckpt_path

    def without_another_runs(fn: TrainerFn, path: Any, *, model_provided: bool, **options: Any) -> Any:
        given = path is None and model_provided and fn != TrainerFn.FITTING
        return None if given else parse(fn, path, model_provided=model_provided, **options)

    connector._parse_ckpt_path = without_another_runs


def restore_in_one_line(connector: Any) -> None:
    """Turn errors about a checkpoint's states into an :class:`InputError` that names the file."""
    for part in ("restore_datamodule", "restore_callbacks", "restore_training_state"):
        setattr(connector, part, partial(_restore, connector, part))


def _restore(connector: Any, part: str) -> None:
    with restoring(str(connector._ckpt_path)):
        getattr(type(connector), part)(connector)
        if part == "restore_training_state":
            _check_moments(connector.trainer)


@contextmanager
def restoring(name: str) -> Iterator[None]:
    """Turn any error about a checkpoint's states into one line that names it."""
    try:
        yield
    except MisconfigurationException:  # of this run's settings
        raise
    except InputError as error:
        if str(error).startswith((name, "checkpoint")):
            raise
        raise InputError(f"{name}: {error}") from error
    except Exception as error:
        raise InputError(f"{name}: a state of the run cannot be restored ({reason(error)})") from error


def _check_moments(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, Mapping) else ():
                shape = getattr(value, "shape", None)
                require(
                    key not in MOMENTS or value is None or shape == parameter.shape,
                    f"optimizer_states: {key} of shape {shape and list(shape)} there and {list(parameter.shape)} here",
                )
                number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
                if key == "step" and not number:  # no text of each tensor in vain
                    raise InputError(f"optimizer_states: step {shortened(value)} is no number")
