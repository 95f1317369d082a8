"""The linear probe with a few examples per class (section 3.1.5), and a class head on the same examples.

The paper does not say how often it draws examples. Its author says that the penalty is chosen on the validation images
of the probe on all data (openai/CLIP#128). Here each number of shots has one penalty: the one with the best mean over
the draws on those images, which are in no draw. A head chooses its own penalty within its examples.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_head import HeadFit, fit_head
from lit_clip.evaluation.logistic import Advance, Fit, LogisticProblem
from lit_clip.evaluation.probe import Classes, Split, among, best_l2, held_out, places_in_classes, searched
from lit_clip.evaluation.scores import evaluate_scores

SHOTS = (1, 2, 4, 8, 16)


class FewShotProbes(NamedTuple):
    """By number of shots: each draw's classifier and the penalty, or why a class has too few examples.

    There are heads if the examples have zero-shot logits.
    """

    fits: dict[int, list[Fit]]
    l2: dict[int, float]
    left_out: dict[int, str]
    heads: dict[int, list[HeadFit]]

    def evaluate(self, test: Split, metric: str, classes: Classes | None = None) -> dict[int, list[float]]:
        """Return, by shots, each draw's metric on a test split; ``classes`` as in :func:`among`."""
        scores = {k: [among(fit.scores(test.features), classes) for fit in fits] for k, fits in self.fits.items()}
        return _values(scores, test, metric)

    def evaluate_heads(self, test: Split, metric: str) -> dict[int, list[float]]:
        """Return, by shots, each head's metric on a test split; empty without heads."""
        if test.zero_shot is None:
            return {}
        names = test.zero_shot.to(test.features)
        scores = {k: [head.logits(test.features, names) for head in heads] for k, heads in self.heads.items()}
        return _values(scores, test, metric)


def _values(scores: dict[int, list[Tensor]], test: Split, metric: str) -> dict[int, list[float]]:
    return {k: [evaluate_scores(metric, each, test.targets)[metric] for each in of] for k, of in scores.items()}


def train_few_shot(
    train: Split,
    val: Split | None,
    metric: str,
    shots: Sequence[int] = SHOTS,
    draws: int = 3,
    seed: int = 0,
    advance: Advance | None = None,
    names: Sequence[str] = (),
) -> FewShotProbes:
    """Train on k random examples per class of ``train``, ``draws`` times, for each k of ``shots`` that classes have.

    The n-th draw of k examples is part of the n-th draw of more. Validation images only choose the penalty, by
    ``metric``; without ``val`` they are a fifth of each class of ``train``, which is then not drawn from. ``names`` are
    of the classes, for messages.
    """
    require(
        train.targets.relevance is None, "few_shot: images have several classes, so shots per class are not defined"
    )
    require(bool((train.targets.labels >= 0).all()), "few_shot: there are images without a class")
    require(draws >= 1 and bool(shots) and min(shots) >= 1, "few_shot: shots and draws must be at least 1")
    pool, validation = held_out(train, seed) if val is None else (train, val)
    counts = pool.targets.labels.bincount(minlength=train.targets.classes)
    fewest = int(counts.argmin())
    result = FewShotProbes({}, {}, {}, {})
    for k in sorted(set(shots)):
        if k > counts[fewest]:
            held = "" if val else ", as a fifth is held out to choose the penalty"
            named = repr(names[fewest]) if names else fewest
            result.left_out[k] = f"class {named} has {int(counts[fewest])} examples to draw from{held}"
            continue
        drawn = [
            pool.take((places_in_classes(pool.targets.labels, seed + draw)[0] < k).nonzero()[:, 0])
            for draw in range(draws)
        ]
        problems = [LogisticProblem(each.features, each.labels, each.targets.classes, advance) for each in drawn]
        search, result.fits[k] = searched(problems, validation, metric)
        result.l2[k] = best_l2(search)
        if train.zero_shot is not None:
            result.heads[k] = [
                fit_head(each.features, each.zero_shot, each.labels, advance=advance)
                for each in drawn
                if each.zero_shot is not None
            ]
    if not result.fits:
        raise InputError(f"few_shot: {result.left_out[min(shots)]}; leave few_shot out of this set's tasks")
    return result
