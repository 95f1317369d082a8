"""Zero-shot, the few-shot probe and a head from the same examples: accuracy, calibration and "none of these".

    python benchmarks/heads.py --model best.ckpt --images validation/classes [--least 24] [--wrong_names]
    python benchmarks/heads.py --model best.ckpt

A third of each class's images are tested, the examples are drawn from the others; without a folder the images are
scikit-learn's digits. The probe chooses its penalty as the head does, by cross-validation within its examples; "best
penalty" is the package's few-shot probe, whose penalty is chosen on the tested images themselves. ECE has 15 bins;
"pooled" is that of all draws' probabilities, "floor" what probabilities that are right would have with as many images.
For "none of these" every other class is unknown: printed are the shares of known images that are kept and of unknown
ones that are found out, by the head's threshold and by one that keeps 95 % of the tested known images.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import lit_clip
from datamodules import ImageFolderClasses
from datamodules.evaluation import Digits
from lit_clip.embedding.reading import encoded_batches, features_of_both_kinds
from lit_clip.evaluation.class_head import fit_head
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.few_shot import train_few_shot
from lit_clip.evaluation.probe import Split, places_in_classes
from lit_clip.evaluation.targets import Targets
from lit_clip.evaluation.thresholds import none_threshold

ERROR, BINS = 0.05, 15


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--images", type=Path, help="a folder of class folders")
    arguments.add_argument("--templates", nargs="+", default=["a photo of a {}."])
    arguments.add_argument("--least", type=int, default=0, help="images of a class; others are left out")
    arguments.add_argument("--draws", type=int, default=5)
    arguments.add_argument("--wrong_names", action="store_true", help="each class has the name of the next")
    options = arguments.parse_args()
    model = lit_clip.load_model(options.model)
    images = ImageFolderClasses(str(options.images)) if options.images else Digits("train")
    train, test = splits(model, images, options.templates, options.least, options.wrong_names)
    assert test.zero_shot is not None
    zero_shot = accuracy(test.zero_shot, test.targets.labels)
    print(f"{test.targets.classes} classes, {len(test.targets)} images tested, zero-shot {100 * zero_shot:.1f}\n")
    print("| examples | probe | best penalty | head | head - better |", end=" ")
    print("ECE | pooled | floor | kept | found out | found out at 95 % |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    found = train_few_shot(train, test, "top1", draws=options.draws)
    best, heads = found.evaluate(test, "top1"), found.evaluate_heads(test, "top1")
    for shots in best:
        favoured, head = (sum(values[shots]) / options.draws for values in (best, heads))
        probe = probe_alone(train, test, shots, options.draws)
        likely = [
            (each.sharpness * each.logits(test.features, test.zero_shot)).softmax(dim=1) for each in found.heads[shots]
        ]
        truth = test.targets.labels
        pooled = calibration_error(torch.cat(likely), truth.repeat(options.draws))
        each = sum(calibration_error(rows, truth) for rows in likely) / options.draws
        drawn = [torch.multinomial(rows, 1, generator=torch.Generator().manual_seed(0))[:, 0] for rows in likely]
        floor = sum(map(calibration_error, likely, drawn)) / options.draws
        none = none_of_these(train, test, shots, options.draws)
        numbers = [f"{100 * value:.1f}" for value in (probe, favoured, head, head - max(probe, zero_shot))]
        numbers += [f"{value:.3f}" for value in (each, pooled, floor)] + none
        print(f"| {shots} |", " | ".join(numbers), "|", flush=True)
    for shots, reason in found.left_out.items():
        print(f"{shots}: {reason}")


@torch.no_grad()
def splits(
    model: lit_clip.CLIP, images: LabelledImages, templates: list[str], least: int, wrong: bool
) -> tuple[Split, Split]:
    """Return what examples are drawn from, and what is tested."""
    labels, rows, parts = torch.tensor(images.labels()), [], []
    for batch, features in encoded_batches(model, images, 64, 2, encode=features_of_both_kinds(model)):
        rows += batch.rows
        parts.append(features)
    both, labels = torch.cat(parts), labels[rows]
    classes = (labels.bincount(minlength=len(images.class_names)) >= max(least, 1)).nonzero()[:, 0]
    kept = torch.isin(labels, classes)
    both, labels = both[kept], torch.searchsorted(classes, labels[kept])
    names = [images.class_names[place].replace("_", " ") for place in classes.tolist()]
    text = lit_clip.zero_shot_classifier(model, names[1:] + names[:1] if wrong else names, templates)
    dimension = model.config.embed_dim
    zero_shot = model.logit_scale.exp() * (both[:, -dimension:] @ text)
    everything = Split(both[:, :-dimension], Targets(labels, len(names)), zero_shot)
    place, count = places_in_classes(labels, 0)
    tested = place < count // 3
    return everything.take((~tested).nonzero()[:, 0]), everything.take(tested.nonzero()[:, 0])


def examples_of(train: Split, shots: int, draw: int) -> Split:
    """Return the draw's examples, as ``train_few_shot`` draws them."""
    return train.take((places_in_classes(train.targets.labels, draw)[0] < shots).nonzero()[:, 0])


def probe_alone(train: Split, test: Split, shots: int, draws: int) -> float:
    """Return the accuracy of a probe with nothing but its examples: a head without names."""
    found = 0.0
    for draw in range(draws):
        drawn = examples_of(train, shots, draw)
        nothing = drawn.features.new_zeros(len(drawn.targets), train.targets.classes)
        probe = fit_head(drawn.features, nothing, drawn.targets.labels).fit
        found += accuracy(probe.scores(test.features), test.targets.labels)
    return found / draws


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def calibration_error(probability: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of the best class's probability."""
    best, place = probability.max(dim=1)
    right, bins = (place == labels).double(), (best * BINS).ceil().clamp(min=1, max=BINS)
    gaps = [(best[bins == b].double().sum() - right[bins == b].sum()).abs() for b in range(1, BINS + 1)]
    return float(sum(gaps)) / len(labels)


def none_of_these(train: Split, test: Split, shots: int, draws: int) -> list[str]:
    """Return the mean shares of known images kept and of unknown ones found out, if there are enough examples."""
    assert train.zero_shot is not None
    assert test.zero_shot is not None
    known, found = torch.arange(0, test.targets.classes, 2), []
    is_known = test.targets.labels % 2 == 0
    for draw in range(draws):
        drawn = examples_of(train, shots, draw)
        drawn = drawn.take((drawn.targets.labels % 2 == 0).nonzero()[:, 0])
        assert drawn.zero_shot is not None
        head = fit_head(drawn.features, drawn.zero_shot[:, known], drawn.targets.labels // 2)
        held_out = head.held_out[head.held_out.isfinite().all(dim=1)]
        if len(held_out) < 1 / ERROR - 1:
            return ["", "", ""]
        score = head.logits(test.features, test.zero_shot[:, known]).amax(dim=1)
        limits = [none_threshold(held_out.amax(dim=1), ERROR), float(score[is_known].quantile(ERROR))]
        found.append([float((score[is_known] >= limits[0]).double().mean())])
        found[-1] += [float((score[~is_known] < limit).double().mean()) for limit in limits]
    return [f"{100 * value:.1f}" for value in torch.tensor(found).mean(dim=0).tolist()]


if __name__ == "__main__":
    main()
