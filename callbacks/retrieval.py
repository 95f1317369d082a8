"""Retrieval, image retrieval and caption choice during training, on sets of a suite."""

from .suite_evaluation import SuiteEvaluation


class Retrieval(SuiteEvaluation):
    """Evaluates the sets of a suite that have captions, such as COCO and SugarCrepe, or the task ``image_retrieval``.

    Logs ``retrieval/<set>/<metric>``, for sets of right and wrong captions ``caption_choice/<set>/<metric>``, and
    ``image_retrieval/<set>/<metric>``. For the arguments see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("retrieval", "caption_choice", "image_retrieval")
