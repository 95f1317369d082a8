"""Print a run's plan before its first step, and its results at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip.module import LitCLIP
from lit_clip.tools.untrusted import convert, entries
from lit_clip.training.lightning.run_folder import curves, run_folder, shown_path
from lit_clip.training.plan import fine_tunes, measure_run, print_next_steps, print_plan, print_summary, print_trained
from lit_clip.training.schedules import known_steps

LOSS, RECALL = "val/loss", "val/mean_recall"
FEW = 100  # pairs to validate, of which the best model is chance: with 11 it was 7 points below the last
ROUNDING = 1e-3  # of a baseline, by which a loss of ln N may be off
Validation = tuple[int, float, float]  # epoch, counted from 1, loss, and mean recall


class PrintPlan(ModelSummary):
    """Print what a run will do, which settings contradict each other, and what fine-tuning trains.

    It is the run's summary: Lightning adds none of its own, which would count no FLOPs.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=0)  # of Lightning's table

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not when training starts: by then a strategy may have sharded the weights.
        if stage == "fit" and trainer.is_global_zero:
            self._plan = measure_run(pl_module, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.ckpt_path:  # which is not known before
            print_plan(self._plan)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.ckpt_path:  # the checkpoint tells how many steps are done
            steps = known_steps(trainer) if self._plan.steps is not None else None
            print_plan(replace(self._plan, steps=steps))
        if trainer.is_global_zero and fine_tunes(pl_module.hparams):
            print_trained(trainer.optimizers[0].param_groups, cast(LitCLIP, pl_module).model)


class PrintResults(Callback):
    """Save a run's last steps; print its last metrics, beside baselines and first values, and its files.

    A ``ModelCheckpoint`` without ``monitor`` saves after a validation, and at the end of a run none may be due.
    """

    def __init__(self) -> None:
        self._validations: list[Validation] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, recall = (float(trainer.callback_metrics.get(name, math.nan)) for name in (LOSS, RECALL))
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.global_step > 0
        if training and math.isfinite(loss) and math.isfinite(recall):
            self._validations.append((trainer.current_epoch + 1, loss, recall))

    def state_dict(self) -> dict[str, Any]:
        return {"validations": [list(each) for each in self._validations]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = convert(state_dict, entries({"validations": list[Validation]}), type(self).__name__)
        self._validations = saved.get("validations", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for saver in trainer.checkpoint_callbacks if trainer.global_step > self._first_step else ():
            if not isinstance(saver, ModelCheckpoint) or saver.monitor or not saver.save_top_k:
                continue  # the best are wanted, or none
            if not saver._should_skip_saving_checkpoint(trainer):
                saver._save_topk_checkpoint(trainer, saver._monitor_candidates(trainer))
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # it would be drawn again over what is printed from here on

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if trainer.is_global_zero:
            print_summary(trainer.callback_metrics, module.baselines, module.before, module.alike)
        saver = trainer.checkpoint_callback
        last = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
        folder = run_folder(trainer)  # every rank must ask
        if not last or not trainer.is_global_zero:
            return
        best, unlearned = _best(trainer, module.baselines)
        lines = [f"curves: {line}" for line in curves(trainer.loggers, trainer.ckpt_path)]
        lines.append(unlearned or misleading_loss(self._validations))
        lines += [f"best {metric}: {shown_path(file)}" for metric, file in best.items()]
        if (pairs := _few_pairs(trainer)) and Path(last) not in best.values() and (best or unlearned):
            lines.append(f"{pairs} pairs to validate are too few to tell the best model; take {shown_path(Path(last))}")
        print_next_steps(Path(last), folder, lines)


def misleading_loss(validations: Sequence[Validation]) -> str:
    """Return a note if the loss was lowest after the first epoch while recall still rose; else nothing."""
    if len(validations) < 2:
        return ""
    (first, first_loss, first_recall), *later = validations
    best, _, best_recall = max(later, key=lambda each: each[2])
    if best_recall <= first_recall or min(loss for _, loss, _ in later) <= first_loss:
        return ""
    return f"{LOSS} rose from epoch {first} on, while {RECALL} rose until epoch {best}: the best model is by recall"


def recommended(trainer: Trainer, module: Any) -> Path | None:
    """Return the checkpoint that the run recommends in its last lines; None if this is the last one."""
    best, _ = _best(trainer, module.baselines)
    return None if _few_pairs(trainer) else next(iter(best.values()), None)


def _few_pairs(trainer: Any) -> int:
    """Return the number of pairs to validate if they are too few; otherwise 0."""
    pairs = len(getattr(getattr(trainer, "datamodule", None), "val_source", None) or ())
    return pairs if pairs < FEW else 0


def _best(trainer: Trainer, baselines: Mapping[str, float]) -> tuple[dict[str, Path], str]:
    """Return the best checkpoint by each metric that a ``ModelCheckpoint`` monitors, and a note.

    A checkpoint that is no better than the metric's baseline is left out; the second value is a line that says so.
    """
    best, notes = dict[str, Path](), list[str]()
    for saver in (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)):
        name, score = str(saver.monitor), saver.best_model_score  # None after a resume, of the run before
        if not saver.monitor or not saver.best_model_path:
            continue
        baseline = baselines.get(name, math.nan)
        gain = (math.nan if score is None else float(score) - baseline) * (1 if saver.mode == "max" else -1)
        if gain <= ROUNDING * baseline:
            notes.append(f"no model is the best by {name}: {score:.4g} is not better than its baseline {baseline:.4g}")
        else:
            best[name if score is None else f"{name} ({score:.4g})"] = Path(saver.best_model_path)
    return best, "\n".join(notes)
