"""Retrieval and caption choice during training, on sets of a suite."""

from .suite_evaluation import SuiteEvaluation


class Retrieval(SuiteEvaluation):
    """Evaluates the sets of a suite that have captions, such as COCO and SugarCrepe.

    Logs ``retrieval/<set>/<metric>`` and, for sets of right and wrong captions, ``caption_choice/<set>/<metric>``. For
    the arguments see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("retrieval", "caption_choice")
