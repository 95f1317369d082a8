"""Callbacks: everything that happens around a training step."""

if __name__ == "callbacks":  # the folder of a clone
    from lit_clip.tools.imports import share_modules

    share_modules(__name__)

from typing import TYPE_CHECKING

from lightning.pytorch import Callback

from lit_clip.errors import require
from lit_clip.tools.guarded_output import log_above_bars, silence
from lit_clip.tools.imports import lazy_names
from .non_finite import NonFiniteSteps
from .preemption import Preemption
from .print_results import PrintPlan, PrintResults
from .progress import ExpectedTime, ProgressLines
from .random_states import RandomStates
from .skipped_samples import SkippedSamples

if TYPE_CHECKING:
    from .compile import ActivationCheckpointing, Compile, PatchDropout
    from .ema import EMA
    from .frozen_features import FrozenFeatures
    from .hard_batches import HardBatches
    from .heads_first import HeadsFirst
    from .monitor import TrainingMonitor
    from .proof import Proof
    from .suite_evaluation import LinearProbe, Retrieval, ZeroShotSegmentation
    from .tensorboard import EmbeddingProjector, SimilarityMatrix
    from .throughput import Throughput
    from .zero_shot import ZeroShot, ZeroShotSet

__all__ = [
    "EMA",
    "ActivationCheckpointing",
    "Compile",
    "EmbeddingProjector",
    "ExpectedTime",
    "FrozenFeatures",
    "HardBatches",
    "HeadsFirst",
    "LinearProbe",
    "NonFiniteSteps",
    "PatchDropout",
    "Preemption",
    "PrintPlan",
    "PrintResults",
    "ProgressLines",
    "Proof",
    "RandomStates",
    "Retrieval",
    "SimilarityMatrix",
    "SkippedSamples",
    "Throughput",
    "TrainingMonitor",
    "Without",
    "ZeroShot",
    "ZeroShotSegmentation",
    "ZeroShotSet",
    "defaults",
]

__getattr__ = lazy_names(__name__, __file__)

# Callbacks of every run that come after the given ones.
AFTER = (PrintPlan, ExpectedTime, ProgressLines, PrintResults, SkippedSamples, NonFiniteSteps, RandomStates)


class Without(Callback):
    """Leave out callbacks of :func:`defaults`; ``--trainer.callbacks-=NAME`` adds it.

    Args:
        names: class names of the callbacks, such as ProgressLines.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names


def defaults(*callbacks: Callback) -> list[Callback]:
    """Return the callbacks that every run has, with the given callbacks inserted at the right places.

    ``lit-clip`` adds them by itself; in Python pass ``Trainer(callbacks=callbacks.defaults())``, or
    ``callbacks.defaults(EMA(0.999))``. A given callback replaces the default one of its class; :class:`Without` leaves
    some out.

    - :class:`Preemption`, first, so that no other callback evaluates what a signal interrupted
    - the given callbacks, first the ones that change the model, so that others measure it as it is trained
    - :class:`PrintPlan`, :class:`ExpectedTime`, :class:`ProgressLines`, and :class:`PrintResults`, which first saves a
      run's last steps if no validation does
    - :class:`SkippedSamples`
    - :class:`NonFiniteSteps`
    - :class:`RandomStates`, last, after all that draws random numbers before the first step
    - :class:`Proof`, if it is given: what it prints is the end of a run

    Messages of Lightning that nobody can act on are silenced from here on, as the command line does
    (:mod:`lit_clip.tools.guarded_output`): it advertises while a trainer is made.
    """
    silence()
    log_above_bars()

    left_out = {name for callback in callbacks if isinstance(callback, Without) for name in callback.names}
    unknown = left_out - {kind.__name__ for kind in (Preemption, *AFTER)} - {"Proof"}
    require(not unknown, f"Without: {', '.join(sorted(unknown))} is none of the callbacks that every run has")
    needed = "Without: Preemption stays; it also knows which validation a resumed run has to begin with"
    require(Preemption.__name__ not in left_out, needed)

    def missing(*kinds: type[Callback]) -> list[Callback]:
        wanted = [kind for kind in kinds if kind.__name__ not in left_out]
        return [kind() for kind in wanted if not any(isinstance(callback, kind) for callback in callbacks)]

    callbacks = tuple(sorted(callbacks, key=lambda callback: not getattr(callback, "changes_model", False)))  # stable
    at_the_end = [callback for callback in callbacks if getattr(callback, "comes_last", False)]
    others = [callback for callback in callbacks if callback not in at_the_end]
    return [*missing(Preemption), *others, *missing(*AFTER), *at_the_end]
