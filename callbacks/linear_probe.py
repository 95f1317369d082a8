"""Linear probes during training."""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.periodic import PeriodicEvaluation, PeriodicResult, from_first_rank
from callbacks.suite_sets import Fold, check_folds, chosen_entries, named, open_sets
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet, LabelledImages
from lit_clip.evaluation.logistic import Fit, LogisticProblem, fit_logistic
from lit_clip.evaluation.other_classes import among, penalty_metric, trained_classes
from lit_clip.evaluation.probe import Split, held_out, train_probe
from lit_clip.evaluation.scores import baseline, evaluate_scores, mean_over_folds
from lit_clip.evaluation.set_encoding import Encoded, SetEncoder
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.targets import Targets
from lit_clip.module import LitCLIP
from lit_clip.tools.images import OnError

Features = dict[str, Encoded]


class LinearProbe(PeriodicEvaluation):
    """Trains the paper's linear probe (appendix A.3) on the image encoder's current features, for sets of a suite.

    Logs ``linear_probe/<set>/<metric>``. All ranks encode; the features are those before the projection. The first rank
    trains the probe while the others wait, so use sets for which that takes minutes at most.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets without a training split are skipped.
        data_root: folder that the suite's paths are relative to. Sets that are not there are skipped with a warning.
        only: names of the suite's sets to evaluate; None: all.
        l2: strength of the penalty; None: search for it as in the paper, which takes about ten times as long.
        every_n_epochs: see :class:`callbacks.periodic.PeriodicEvaluation`.
        every_n_steps: see :class:`callbacks.periodic.PeriodicEvaluation`.
        batch_size: images encoded at once on each rank.
        num_workers: data workers of each rank; None: a share of the cores, and none for a small set.
        on_error: for an image that cannot be read, stop with an error or skip it with a warning.
    """

    def __init__(
        self,
        suite: str | list[str],
        data_root: str = ".",
        only: list[str] | None = None,
        l2: float | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        require(l2 is None or l2 > 0, f"LinearProbe.l2: {l2} must be above 0")
        self.data_root, self.l2 = data_root, l2
        self.entries = chosen_entries(suite, only, ["linear_probe"], "LinearProbe")
        require(bool(self.entries), "LinearProbe.suite: no set has a split to train on")
        self._reader = SetEncoder(batch_size, num_workers, on_error, "LinearProbe")
        self._opened: dict[str, list[Fold]] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted(self.entries))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reader.processes = trainer.num_devices
        if self._opened is None:
            self._opened = open_sets(self.entries, ["train", "val", "test"], self.data_root, "LinearProbe")
            for name, folds in self._opened.items():
                with named(name):
                    check_folds(folds, self.entries[name].metric, _classes(folds[0]["test"]), self._reader.on_error)
                    for fold in folds:
                        _check_learnable(fold, self.l2)

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        result = PeriodicResult()
        for name, folds in (self._opened or {}).items():
            entry = self.entries[name]
            features = self._features(module, name, folds)
            with named(name):
                of_set = from_first_rank(partial(_probe, entry, folds, features, self.l2, module.device))
            result.metrics |= {f"linear_probe/{name}/{key}": value for key, value in of_set.metrics.items()}
            result.baselines |= {f"linear_probe/{name}/{key}": value for key, value in of_set.baselines.items()}
        return result

    def _features(self, module: LitCLIP, name: str, folds: list[Fold]) -> list[Features]:
        """Encode every split of every fold; splits with the same images are encoded once."""
        encoded_by_stamp: dict[str, Encoded] = {}
        results: list[Features] = []
        for number, fold in enumerate(folds):
            results.append({})
            for split, images in fold.items():
                stamp = f"{len(images)} {images.stamp()}" if len(folds) > 1 else split
                if stamp not in encoded_by_stamp:
                    title = f"{name} {split}" + (f" {number + 1}/{len(folds)}" if len(folds) > 1 else "")
                    encoded_by_stamp[stamp] = self._reader.encode(
                        module.model, images, lambda pixels: module.model.image_features(pixels)[0], title
                    )
                results[-1][split] = encoded_by_stamp[stamp]
        return results


def _check_learnable(fold: Fold, l2: float | None) -> None:
    """Raise :class:`InputError` for labels that no classifier can be learnt from."""
    for split in fold:
        targets = Targets.of(fold[split])
        if split == "train":
            train = Split(torch.zeros(len(targets), 1), targets)
            train = held_out(train, 0)[0] if l2 is None and "val" not in fold else train
            LogisticProblem(train.features, train.labels, targets.classes)


def _probe(
    entry: SuiteEntry, folds: list[Fold], features: list[Features], l2: float | None, device: torch.device
) -> PeriodicResult:
    """Compute the metrics, averaged over folds, and the baseline in the first fold."""
    metrics: list[dict[str, float]] = []
    metric = entry.metric
    baseline_value = None
    with torch.autocast(device.type, enabled=False):
        for fold, encoded in zip(folds, features, strict=True):
            classes = trained_classes(entry, fold)
            splits = {split: _split(fold[split], encoded[split], device) for split in fold}
            if baseline_value is None:
                baseline_value = baseline(metric, splits["test"].targets)
            if l2 is None:
                fit = train_probe(splits["train"], splits.get("val"), penalty_metric(metric, classes)).fit
            else:
                fit = _with_penalty(splits, l2)
            scores = among(fit.scores(splits["test"].features), classes)
            metrics.append(evaluate_scores(metric, scores, splits["test"].targets))
    return PeriodicResult(mean_over_folds(metrics), {} if baseline_value is None else {metric: baseline_value})


def _with_penalty(splits: dict[str, Split], l2: float) -> Fit:
    """Train on all but the test split with a given penalty."""
    train = [splits[name] for name in ("train", "val") if name in splits]
    features, labels = torch.cat([split.features for split in train]), torch.cat([split.labels for split in train])
    return fit_logistic(features, labels, train[0].targets.classes, l2)


def _classes(images: ImageSet) -> int | None:
    return len(images.class_names) if isinstance(images, LabelledImages) else None


def _split(images: ImageSet, encoded: Encoded, device: torch.device) -> Split:
    return Split(encoded.features.to(device), Targets.of(images, encoded.rows))
