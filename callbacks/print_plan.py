"""Print the plan of a run before the first step."""

from dataclasses import replace
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary

from lit_clip.module import LitCLIP
from lit_clip.training.plan import fine_tunes, measure_run, print_plan
from lit_clip.training.schedules import known_steps
from lit_clip.training.summary import print_trained


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
