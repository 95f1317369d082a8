"""Which share of images of unknown kinds a head calls "none of these", and from how many examples probabilities hold.

    python benchmarks/unknown_kinds.py --model last.ckpt --images train/classes --test validation/classes --unknown 3

In each draw some classes are unknown and the examples of the others are drawn anew; ``--others`` is a folder of images
that show none of the classes at all. Printed are means over the draws with their standard deviations, in %: known
images right, known images kept (the aim is 95), unknown ones and others found out, and the calibration error (15 bins,
as in ``heads.py``) of the known images' probabilities, with what exactly right probabilities would have.
"""

import argparse
from pathlib import Path

import torch
from heads import ERROR, accuracy, calibration_error
from torch import Tensor

import lit_clip
from lit_clip.embedding.image_files import FileRows, images_in
from lit_clip.embedding.reading import encoded_batches, features_of_both_kinds
from lit_clip.errors import InputError
from lit_clip.evaluation.class_head import fit_head
from lit_clip.evaluation.probe import Split, places_in_classes
from lit_clip.evaluation.targets import Targets
from lit_clip.evaluation.thresholds import none_threshold

SHOTS = (1, 2, 4, 8, 16)
COLUMNS = ("right", "kept", "unknown found out", "others found out", "ECE", "ECE if right")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--images", type=Path, required=True, help="class folders that examples are drawn from")
    arguments.add_argument("--test", type=Path, required=True, help="class folders that are tested")
    arguments.add_argument("--others", type=Path, help="a folder of images of none of the classes")
    arguments.add_argument("--unknown", type=int, default=3, help="classes that are unknown in each draw")
    arguments.add_argument("--least", type=int, default=1, help="images of a class to draw from; others are left out")
    arguments.add_argument("--draws", type=int, default=20)
    options = arguments.parse_args()
    model = lit_clip.load_model(options.model)
    train, test = ((names_in(folder), encoded(model, folder)) for folder in (options.images, options.test))
    names = sorted(name for name in set(train[0]) & set(test[0]) if train[0].count(name) >= options.least)
    text = model.logit_scale.exp() * lit_clip.zero_shot_classifier(model, names, ["a photo of a {}."])
    parts = [split_of(both, found, names, text.detach()) for found, both in (train, test)]
    others = split_of(encoded(model, options.others), None, names, text.detach()) if options.others else None
    print_table(parts[0], parts[1], others, options.unknown, options.draws)


def names_in(folder: Path) -> list[str]:
    return [file.path.parent.name.replace("_", " ") for file in images_in(folder)]


@torch.no_grad()
def encoded(model: lit_clip.CLIP, folder: Path) -> Tensor:
    files = FileRows(images_in(folder))
    batches = encoded_batches(model, files, 64, 1, encode=features_of_both_kinds(model), title=str(folder))
    return torch.cat([features for _, features in batches])


def split_of(both: Tensor, found: list[str] | None, names: list[str], text: Tensor) -> Split:
    """Return the images of some classes, or all images as of none; ``text`` are the names' features ``[D, C]``."""
    rows = torch.tensor([row for row in range(len(both)) if found is None or found[row] in names])
    labels = torch.tensor([-1 if found is None else names.index(found[row]) for row in rows.tolist()])
    both = both[rows]
    return Split(both[:, : -len(text)], Targets(labels, len(names)), both[:, -len(text) :] @ text)


def print_table(train: Split, test: Split, others: Split | None, unknown: int, draws: int) -> None:
    print("| examples |", " | ".join(COLUMNS), "|")
    print("|--:|" + "--:|" * len(COLUMNS))
    for shots in SHOTS:
        found = torch.tensor([one_draw(train, test, others, unknown, shots, draw) for draw in range(draws)])
        cells = []
        for values in 100 * found.T:
            seen = values[values.isfinite()]
            cells.append(f"{seen.mean():.1f} ± {seen.std():.1f}" if len(seen) > 1 else "")
        print(f"| {shots} |", " | ".join(cells), "|", flush=True)


def one_draw(train: Split, test: Split, others: Split | None, unknown: int, shots: int, draw: int) -> tuple[float, ...]:
    """Return the values of :data:`COLUMNS` as fractions, NaN where there is none."""
    classes = train.targets.classes
    known = torch.randperm(classes, generator=torch.Generator().manual_seed(draw))[unknown:].sort().values
    number = torch.full((classes,), -1).scatter(0, known, torch.arange(len(known)))
    place, _ = places_in_classes(train.targets.labels, draw)
    drawn = train.take(((place < shots) & (number[train.targets.labels] >= 0)).nonzero()[:, 0])
    assert drawn.zero_shot is not None
    assert test.zero_shot is not None
    head = fit_head(drawn.features, drawn.zero_shot[:, known], number[drawn.targets.labels])
    logits = head.logits(test.features, test.zero_shot[:, known])
    truth = number[test.targets.labels]
    shown = truth >= 0
    likely = (head.sharpness * logits[shown]).softmax(dim=1)
    sampled = torch.multinomial(likely, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    errors = calibration_error(likely, truth[shown]), calibration_error(likely, sampled)
    kept, rejected, elsewhere = float("nan"), float("nan"), float("nan")
    held_out = head.held_out[head.held_out.isfinite().all(dim=1)]
    try:
        limit = none_threshold(held_out.amax(dim=1) if len(held_out) else held_out[:, 0], ERROR)
    except InputError:  # too few examples
        return accuracy(logits[shown], truth[shown]), kept, rejected, elsewhere, *errors
    best = logits.amax(dim=1)
    kept, rejected = float((best[shown] >= limit).double().mean()), float((best[~shown] < limit).double().mean())
    if others is not None and others.zero_shot is not None:
        far = head.logits(others.features, others.zero_shot[:, known]).amax(dim=1)
        elsewhere = float((far < limit).double().mean())
    return accuracy(logits[shown], truth[shown]), kept, rejected, elsewhere, *errors


if __name__ == "__main__":
    main()
