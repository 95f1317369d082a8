"""The plan of a run, printed before the first step."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary

from lit_clip.training.plan import measure_run
from lit_clip.training.plan_table import print_plan
from lit_clip.training.summary import print_parameter_groups


class PrintPlan(ModelSummary):
    """Print what a run is about to do, where its settings contradict each other, and what fine-tuning trains.

    It is the run's summary: Lightning adds none of its own, which would count no FLOPs.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=0)  # of Lightning's table

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not when training starts: by then a strategy may have sharded the weights.
        if stage == "fit" and trainer.is_global_zero:
            print_plan(measure_run(pl_module, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hparams = pl_module.hparams
        if trainer.is_global_zero and any(hparams.get(name) for name in ("freeze", "layer_decay", "lora")):
            frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
            print_parameter_groups(trainer.optimizers[0].param_groups, frozen)
