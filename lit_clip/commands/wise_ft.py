"""``lit-clip wise-ft``: interpolate two checkpoints (Wortsman et al. 2022, arXiv:2109.01903)."""

import copy
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from rich.table import Column, Table
from torch import Tensor

from lit_clip.embedding.encode import Encoding, check_complete
from lit_clip.embedding.feature_files import check_output
from lit_clip.embedding.reading import UnreadableRow, encoded_batches, image_features
from lit_clip.errors import InputError, require
from lit_clip.evaluation.targets import accuracies, classification_counts
from lit_clip.evaluation.zero_shot import ZeroShotSet, zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.models.config import differences
from lit_clip.tools.atomic import claimed
from lit_clip.tools.console import Console, stderr
from lit_clip.tools.hardware import autocast, best_device
from lit_clip.tools.images import or_skip
from lit_clip.tools.messages import OptionParser, one_line
from lit_clip.tools.reading import naming, read_yaml
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO
from lit_clip.weights.checkpoints import saved_tokenizer
from lit_clip.weights.load import load_model

Results = dict[str, dict[float, float]]  # set -> alpha -> top-1
ENCODING = Encoding()


class InterpolatedModels:
    """Models ``(1 - alpha) * before + alpha * after`` of one architecture, one at a time; errors use the names."""

    def __init__(self, before: CLIP, after: CLIP, names: tuple[str, str] = ("before", "after")) -> None:
        wrong = differences(after.config, before.config)
        require(not wrong, f"{names[1]} has another architecture than {names[0]}: {', '.join(wrong)}")
        self.model = copy.deepcopy(before)
        self._ends = before.state_dict(), after.state_dict()

    @torch.no_grad()
    def at(self, alpha: float, only: str = "") -> CLIP:
        """Return the model at ``alpha``, exact at 0 and 1; ``only`` limits it to weights with these prefixes."""
        before, after = self._ends
        for name, value in self.model.state_dict().items():
            if name.startswith(only):
                mixed = value.is_floating_point() and alpha not in (0, 1)
                nearest = (after if alpha >= 0.5 else before)[name]  # integers, such as batch counters, are not mixed
                value.copy_(torch.lerp(before[name], after[name], alpha) if mixed else nearest)
        return self.model


def wise_ft(
    before: str,
    after: str,
    *,
    sets: str,
    output: str | None = None,
    alphas: str = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    target: str | None = None,
    alpha: float | None = None,
    encoding: Encoding = ENCODING,
) -> None:
    """Evaluate the models between a checkpoint and its fine-tuned version, and write the best one.

    The best has the highest mean of two accuracies: top-1 on the target set, and the mean top-1 on the other sets,
    which are held out. Among equals it is the one nearest to the checkpoint before. Every image is read once.

    Args:
        before: the model before fine-tuning: anything that lit_clip.load_model opens.
        after: the fine-tuned checkpoint.
        sets: a YAML file of sets by name, in the format of the callback ZeroShot.
        output: the checkpoint to write the chosen model to.
        alphas: points between before (0) and after (1), separated by commas.
        target: the set that the model was fine-tuned for; the first one by default.
        alpha: choose this point instead of the best.
        encoding: how images are read and encoded. Weights are interpolated and written in float32.
    """
    wanted, found = _read_alphas(alphas, alpha), read_sets(sets)
    require(bool(found), "--sets: empty; give at least one set")
    target = target or next(iter(found))
    require(target in found, f"--target {target}: no such set; there are {', '.join(found)}")
    path = Path(output) if output else None
    if path:
        check_output(path, [".ckpt"])
    device = best_device()
    with claimed(path):
        line = InterpolatedModels(load_model(before).to(device), load_model(after).to(device), (before, after))
        results = evaluate_line(line, found, wanted, encoding)
        chosen = best_alpha(results, target) if alpha is None else alpha
        _print(results, target, chosen, by_rule=alpha is None)
        if path is not None:
            save(line.at(chosen), path, {"before": before, "after": after, "alpha": chosen})


def _read_alphas(words: str, chosen: float | None) -> list[float]:
    try:
        alphas = {float(word) for word in words.split(",")} | ({chosen} if chosen is not None else set())
    except ValueError as error:
        raise InputError(f"--alphas {words}: must be numbers separated by commas, such as 0,0.5,1") from error
    for value in alphas:
        require(0 <= value <= 1, f"--alphas: {value} must be between 0 and 1")
    return sorted(alphas)


def read_sets(path: str) -> dict[str, ZeroShotSet]:
    """Read zero-shot sets from YAML: each name has ``images`` (a class with its arguments) and ``templates``."""
    values = read_yaml(path, "--sets")
    if not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
        raise InputError(f"--sets: {path}: must hold sets by name: {{name: {{images: ...}}}}")
    parser = OptionParser(exit_on_error=False)
    parser.add_argument("--sets", type=dict[str, ZeroShotSet], required=True)
    with naming(path):
        try:
            return parser.instantiate(parser.parse_object({"sets": values}))["sets"]
        except ArgumentError as error:
            raise InputError(one_line(error)) from error


@torch.inference_mode()
def evaluate_line(
    line: InterpolatedModels, sets: dict[str, ZeroShotSet], alphas: list[float], encoding: Encoding = ENCODING
) -> Results:
    """Compute the zero-shot top-1 of each set at each alpha, in one pass over the images.

    The weights are interpolated for every batch: that is cheaper than decoding the images again for every alpha.
    """
    model = line.model

    def encode(images: Tensor) -> Tensor:
        """Encode uint8 ``[B, 3, H, W]`` at each alpha -> ``[B, A, D]``, of unit length."""
        ends = (line.at(a, only="visual.") for a in alphas)
        return torch.stack([image_features(end, encoding.precision)(images) for end in ends], dim=1)

    results: Results = {}
    for name, zero_shot_set in sets.items():
        images, templates = zero_shot_set.images, zero_shot_set.templates
        assert not isinstance(templates, str)  # __post_init__ has replaced it
        classifiers: dict[float, Tensor] = {}  # [D, C]
        for a in alphas:
            with autocast(model.device, encoding.precision):  # one for each alpha: it may keep its casts of the weights
                classifiers[a] = zero_shot_classifier(line.at(a), images.class_names, templates)
        counts = {a: torch.zeros(3, len(images.class_names), dtype=torch.float64) for a in alphas}
        labels = torch.tensor(images.labels())
        settings, unreadable = (encoding.batch_size, encoding.workers), list[UnreadableRow]()
        for batch, features in encoded_batches(model, images, *settings, encode=encode, title=name):
            for bad in batch.unreadable:
                require(encoding.on_error == "skip", or_skip(f"{name}: {bad.message}", "--on_error skip"))
            unreadable += batch.unreadable
            if batch.rows:
                for a, features_a in zip(alphas, features.unbind(dim=1), strict=True):
                    logits = features_a @ classifiers[a].to(features_a)
                    counts[a] += classification_counts(logits.cpu(), labels[batch.rows])
        with naming(name):
            check_complete(len(labels) - len(unreadable), len(labels), unreadable)
        for bad in unreadable:
            stderr().print(f"skipped: {name}: {bad.message}")
        results[name] = {a: accuracies(count)["top1"] for a, count in counts.items()}
    return results


def _score(results: Results, target: str, alpha: float) -> float:
    held_out = [results[name][alpha] for name in results if name != target]
    mine = results[target][alpha]
    return (mine + sum(held_out) / len(held_out)) / 2 if held_out else mine


def best_alpha(results: Results, target: str) -> float:
    """Choose an alpha by the rule of :func:`wise_ft`."""
    return max(sorted(results[target]), key=lambda alpha: _score(results, target, alpha))


def _print(results: Results, target: str, chosen: float, by_rule: bool) -> None:
    held_out = [name for name in results if name != target]
    columns = ("alpha", f"{target} (target)", *(f"{name} (held out)" for name in held_out), "mean")
    table = Table(*(Column(column, justify="right") for column in columns), title="Zero-shot top-1, %")
    for alpha in results[target]:
        values = [*(results[name][alpha] for name in (target, *held_out)), _score(results, target, alpha)]
        cells = (f"{100 * value:.2f}" for value in values)
        table.add_row(f"{alpha:g}", *cells, style="bold" if alpha == chosen else None)
    console = Console()
    console.print(table)
    why = "the highest mean of target and held-out sets" if by_rule else "as given"
    console.print(f"chosen: alpha {chosen:g}, {why}")


def save(model: CLIP, path: Path, origin: dict[str, Any]) -> None:
    """Write a checkpoint with weights only, in the format of ``lit-clip fit``."""
    from lightning import __version__

    state: dict[str, Tensor] = {name: value.cpu() for name, value in model.state_dict().items()}
    checkpoint = {
        "state_dict": state,
        "hyper_parameters": {"architecture": model.config.to_dict()},
        "pytorch-lightning_version": __version__,
        **saved_tokenizer(model),
        "wise_ft": origin,
    }
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
