"""Train the heads of two encoders alone before the first step, so that their blocks start from a common space."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_clip import distributed
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP
from .proof import evaluating, heads_alone
from .random_states import random_states, restore_random_states


class HeadsFirst(Callback):
    """Start with heads that were trained alone for some seconds, on features that are computed once.

    Behind random heads the first steps bend what the encoders have learned (LP-FT, Kumar et al. 2022). For timm's image
    encoders with Hugging Face's text encoders, each with a projection; other runs, and resumed ones, start as they are.
    """

    changes_model = True  # before others measure it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(LitCLIP, pl_module)
        if trainer.global_step or module.starts_trained or cast(Any, trainer).fast_dev_run:
            return
        states, sharded = random_states(), isinstance(trainer.strategy, FSDP)
        with evaluating(trainer, module):
            found = {} if sharded else heads_alone(trainer, module)
        if not found:
            reason = "its weights are sharded" if sharded else "its encoders have no two projections that are trained"
            rank_zero_info(f"HeadsFirst: the run starts as it is: {reason}")
        module.model.load_state_dict(distributed.gather_objects([found])[0], strict=False)  # the first rank's
        restore_random_states(states)
