"""Zero-shot segmentation and the pointing game during training, on sets of a suite."""

from .suite_evaluation import SuiteEvaluation


class ZeroShotSegmentation(SuiteEvaluation):
    """Evaluates the sets of a suite that have masks or boxes, such as ADE20K and Pascal VOC.

    Logs ``segmentation/<set>/miou`` and ``pixel_accuracy``, ``pointing/<set>/accuracy`` and ``mean_per_class``. A rank
    encodes one image at a time. For the arguments see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("segmentation", "pointing")
