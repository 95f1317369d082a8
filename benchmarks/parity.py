"""Train the same model on the same files by the same recipe with ``open_clip_train`` and ``lit-clip fit``.

    python benchmarks/parity.py [--model RN-tiny-64] [--epochs 30] [--batch 256] [--bf16] [--table FILE] [--seed 0]

Both programs are started as in ``epoch.py`` and take turns, an epoch each. Printed are the losses of both after each
epoch, and the times that each took to the lowest training and the lowest validation loss that both have reached; the
first epoch is not timed. The data are OpenMoji's, as in ``epoch.py``, or a table with the columns ``image`` and
``caption``, whose last batch is for validation, such as the icons of ``recipes/icons.py``. The batch holds all
validation pairs, as open_clip computes the validation loss within batches. Initial weights and the order of the pairs
are each program's own, so the losses agree as those of two seeds do.

The training loss is the mean of an epoch's steps. open_clip_train needs pandas and webdataset.
"""

import re
import tempfile
from pathlib import Path

from epoch import MODELS, Run, alternate, write_run
from results import compared, need, parser, save

from datamodules.openmoji import held_out, read_table


def losses(lines: list[str], pattern: str) -> list[float]:
    """Return the numbers that a pattern's group matches, in their order."""
    return [float(found[1]) for line in lines if (found := re.search(pattern, line))]


def seconds_to(loss: float, reached: list[float], seconds: list[float]) -> float:
    """Return the time to the end of the first epoch whose loss is at most ``loss``."""
    first = next(i for i, each in enumerate(reached) if each <= loss)
    return sum(seconds[: first + 1])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=MODELS, default="RN-tiny-64")
    arguments.add_argument("--bf16", action="store_true", help="autocast on both sides")
    arguments.add_argument("--epochs", type=int, default=30, help="epochs of each that are compared")
    arguments.add_argument("--batch", type=int, default=256)
    arguments.add_argument("--table", type=Path, help="CSV of images and captions instead of OpenMoji's")
    arguments.add_argument("--seed", type=int, default=0, help="of both programs")
    options = arguments.parse_args()
    from peers import end_if_emulated

    end_if_emulated(options.bf16, "cpu")
    need("pandas", "webdataset")
    if options.table is None and options.batch < (pairs := sum(held_out(read_table()))):
        arguments.error(f"--batch: must be at least {pairs}, the number of validation pairs")
    with tempfile.TemporaryDirectory() as folder:
        settings = (options.model, options.bf16, options.epochs + 2, options.batch)
        run = write_run(Path(folder), Run(*settings, table=options.table, seed=options.seed))
        both, their_lines, our_lines = alternate(run, log_every=1)
    last = slice(1, options.epochs + 1)  # without the first epoch
    training = [
        losses(their_lines, r"Train Epoch: .* \(100%\).*Loss: \S+ \((\S+)\)")[last],
        losses(our_lines, r"^mark train loss (\S+)")[last],
    ]
    validation = [
        losses(their_lines, r"clip_val_loss: (\S+)")[last],
        losses(our_lines, r"^mark val loss (\S+)")[last],
    ]
    print("epoch, training loss of open_clip and lit-clip, validation loss of both")
    for i, row in enumerate(zip(*training, *validation, strict=True)):
        print(f"{i + 2:5}  " + "  ".join(f"{loss:7.4f}" for loss in row))
    seconds = [[epoch[side][1] for epoch in both] for side in (0, 1)]
    apart = [abs(theirs - ours) / theirs for theirs, ours in zip(*training, strict=True)]
    figures = {
        "mean_relative_difference_of_training_losses": sum(apart) / len(apart),
        "peers_last_training_loss": training[0][-1],
        "our_last_training_loss": training[1][-1],
    }
    what = f"{options.model}, batch {options.batch}, {'bf16' if options.bf16 else 'fp32'}"
    name = f"parity/{what.replace(', batch ', '/').replace(', ', '/')}"
    results = [compared(f"{name}/epoch", f"a whole epoch, {what}", list(zip(*seconds, strict=True)), figures=figures)]
    for kind, reached in (("training", training), ("validation", validation)):
        loss = max(min(each) for each in reached)
        times = [seconds_to(loss, *each) for each in zip(reached, seconds, strict=True)]
        title = f"time to a {kind} loss of {loss:.3f}, {what}"
        results.append(compared(f"{name}/{kind}", title, [(times[0], times[1])], figures={f"{kind}_loss": loss}))
    for result in results:
        times = f"{result.peer} {result.peers:.1f} s, lit-clip {result.ours:.1f} s"
        print(f"{result.title}: {times}, times as fast: {result.ratio}")
    save(options.json, *results)


if __name__ == "__main__":
    main()
