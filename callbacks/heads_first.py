"""Train the heads of two encoders alone before the first step, so that their blocks start from a common space."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.functional import dropout

from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.evaluation.heads_alone import heads_of
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP
from .proof import evaluating, heads_alone
from .random_states import random_states, restore_random_states


class HeadsFirst(Callback):
    """Start from heads that were trained alone for some seconds, on features that are computed once.

    Behind random heads the first steps bend what the encoders have learned (LP-FT, Kumar et al. 2022). For timm's image
    encoders with Hugging Face's text encoders, each with a projection; other runs start as they are. A small
    ``model.rates.head`` keeps the heads as they then are.

    Args:
        dropout: share of the features before each head that a training step drops.
    """

    changes_model = True  # before others measure it

    def __init__(self, dropout: float = 0.5) -> None:
        require(0 <= dropout < 1, f"HeadsFirst.dropout: {dropout} must be at least 0 and below 1")
        self.dropout, self._hooks = dropout, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(LitCLIP, pl_module)
        if module.starts_trained or cast(Any, trainer).fast_dev_run:
            return
        if not trainer.global_step:
            self._train(trainer, module)
        for head in (heads_of(module.model) or {}).values():
            self._hooks.append(head.register_forward_pre_hook(self._drop))

    def _train(self, trainer: Trainer, module: LitCLIP) -> None:
        states, sharded = random_states(), isinstance(trainer.strategy, FSDP)
        with evaluating(trainer, module):
            found = {} if sharded else heads_alone(trainer, module)
        if not found:
            reason = "its weights are sharded" if sharded else "its encoders have no two projections that are trained"
            rank_zero_info(f"HeadsFirst: the run starts as it is: {reason}")
        module.model.load_state_dict(distributed.gather_objects([found])[0], strict=False)  # the first rank's
        restore_random_states(states)

    def _drop(self, head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (dropout(inputs[0], self.dropout, head.training), *inputs[1:])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
