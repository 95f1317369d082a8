"""Measure what a model should still do after training; :class:`callbacks.Proof` imports these modules when needed."""

from collections.abc import Sequence
from pathlib import Path

from lit_clip.errors import require
from lit_clip.evaluation.before_after import Measured, retrieval_scores
from lit_clip.evaluation.classification import embeddings, keys_of, targets_of
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.open_set import Fold, OpenSet
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.targets import ranks_of_labels
from lit_clip.models.clip import CLIP
from lit_clip.retrieval.metrics import similarities
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.parts import instantiate
from lit_clip.tools.reading import naming
from .suite_evaluation import SuiteEvaluation


class Rest(SuiteEvaluation):
    """Encode and measure further sets; this callback is not added to a trainer."""

    tasks = ("zero_shot", "retrieval")
    needs_suite = False

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(None, on_error="skip")
        self.rest = {path: open_rest(path) for path in paths}

    def measured(self, model: CLIP) -> dict[str, Measured]:
        """Measure a model on each set."""
        return {Path(path).stem or path: self._measured(model, each) for path, each in self.rest.items()}

    def _measured(self, model: CLIP, opened: OpenSet) -> Measured:
        current = self.encoded(model, opened)
        (fold,) = current.folds
        image_ND, keys = embeddings(fold.features["test"]), keys_of(fold)
        if current.captions is not None:
            scores, _ = retrieval_scores(image_ND, *current.captions)
            return Measured(hex_digest([keys, current.texts["retrieval"]]), scores, {})
        assert current.classifier is not None
        targets = targets_of(current, fold, "test")
        score_NC = similarities(image_ND, current.classifier.T)  # not under the run's autocast, which would round them
        right = ranks_of_labels(score_NC, targets.labels) < 1
        return Measured(hex_digest([keys, targets.digest()]), {"zero-shot top-1": right.double()}, {})


def open_rest(path: str) -> OpenSet:
    """Open a folder with a subfolder for each class, or a source of pairs."""
    classes = Path(path).is_dir() and any(each.is_dir() for each in Path(path).glob("[!.]*"))
    kind, option = ("ImageFolderClasses", "root") if classes else ("evaluation.CaptionedPairs", "path")
    spec = {"class_path": f"lit_clip.datamodules.{kind}", "init_args": {option: path}}
    with naming("Proof.rest"):
        images = instantiate(ImageSet, spec)
        require(len(images) > 0, f"{path}: there are no images")
    return OpenSet(path, SuiteEntry(spec), [Fold({"test": images})], ["zero_shot" if classes else "retrieval"])
