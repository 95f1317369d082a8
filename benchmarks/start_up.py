"""Time how long commands of lit-clip and open_clip_train take to start, alternating, after one warm-up run each.

    python benchmarks/start_up.py [--pairs 5] [--steps 5]

Compares ``lit-clip --help`` and ``lit-clip fit --help`` with ``python -m open_clip_train.main --help``. Then
``--steps`` times the processor time, of the user and of the system and with data workers, until the end of the first
optimiser step: ``lit-clip fit --config configs/quickstart.yaml`` with images already drawn and cached, and
``open_clip_train`` with the same model, batch size and data as PNG files. open_clip_train needs pandas and webdataset.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from epoch import BENCHMARKS, Run, lit_clip_command, open_clip_command, write_run
from results import Result, compared, need, pair_parser, save
from running import processor_seconds_until, seconds_of_all

PEER = (sys.executable, "-m", "open_clip_train.main", "--help")
QUICKSTART = BENCHMARKS.parent / "configs/quickstart.yaml"


def alternated(theirs: Callable[[], float], ours: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Return the seconds of both, without the first pair."""
    return [(theirs(), ours()) for _ in range(pairs + 1)][1:]


def of_help(name: str, words: Sequence[str], pairs: int) -> Result:
    ours = lit_clip_command(*words)
    times = alternated(lambda: seconds_of_all(PEER), lambda: seconds_of_all(ours), pairs)
    title = f"`lit-clip {' '.join(words)}` beside `python -m open_clip_train.main --help`"
    return compared(name, title, times)


def of_first_step(pairs: int) -> Result:
    """Time both to the end of the first optimiser step, in the processor's fastest precision."""
    from lit_clip.cli.lightning import computes_in_bfloat16

    with tempfile.TemporaryDirectory() as temporary:
        run = write_run(Path(temporary), Run("RN-tiny-64", batch=256, bf16=bool(computes_in_bfloat16("cpu")), epochs=1))
        theirs = open_clip_command(run, log_every=1)
        logger = ("--trainer.logger.init_args.save_dir", temporary)
        ours = lit_clip_command("fit", "--config", str(QUICKSTART), "--trainer.callbacks+=marks.Marks", *logger)
        times = alternated(
            lambda: processor_seconds_until(theirs, r"Train Epoch: 0 \["),
            lambda: processor_seconds_until(ours, "^mark step 1", BENCHMARKS),
            pairs,
        )
    title = "processor time of `lit-clip fit --config configs/quickstart.yaml` to its first step"
    return compared("start_up/first_step", title, times)


def main() -> None:
    arguments = pair_parser(__doc__)
    arguments.add_argument("--steps", type=int, default=5, help="pairs of runs to the first step")
    options = arguments.parse_args()
    need("pandas", "webdataset")
    found = [
        of_help("start_up/help", ("--help",), options.pairs),
        of_help("start_up/fit_help", ("fit", "--help"), options.pairs),
    ]
    if options.steps:
        found.append(of_first_step(options.steps))
    for one in found:
        print(f"{one.title}: {one.peer} {one.peers:.2f} s, lit-clip {one.ours:.2f} s, times as fast: {one.ratio}")
    save(options.json, *found)


if __name__ == "__main__":
    main()
