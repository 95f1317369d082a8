"""Linear probes during training."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from .suite_evaluation import SuiteEvaluation


class LinearProbe(SuiteEvaluation):
    """Trains the paper's linear probe (appendix A.3) on the image encoder's current features, for sets of a suite.

    Logs ``linear_probe/<set>/<metric>``. The features are those before the projection. The first rank trains the probe
    while the others wait, so use sets for which that takes minutes at most.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets without a training split are left out.
        data_root: folder that the suite's paths are relative to.
        only: names of the suite's sets to evaluate; None: all.
        l2: strength of the penalty; None: search for it as in the paper, which takes about ten times as long.
        options: see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("linear_probe",)

    def __init__(
        self,
        suite: str | list[str],
        data_root: str = ".",
        only: list[str] | None = None,
        l2: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(suite, data_root, only, **options)
        require(l2 is None or l2 > 0, f"LinearProbe.l2: {l2} must be above 0")
        self.options = replace(self.options, l2=l2)

    def features(self, model: CLIP, pixels: Tensor) -> Tensor:
        return model.image_features(pixels)[0]
