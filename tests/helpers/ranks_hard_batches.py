"""One rank of a run with hard batches, as a program: the samples of its steps go to a file."""

import json
import sys
from pathlib import Path

from callbacks import HardBatches
from datamodules import BatchOptions
from lit_clip import distributed
from tests.helpers.frozen_runs import Run, fit


def main() -> None:
    """Train on as many ranks as the second argument says, with four pairs a step."""
    folder, world, table = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    trainer = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    data = {"batches": BatchOptions(hard=0.5), "batch_size": 4 // world}
    recorder, _ = fit(Run(str(folder), table, freeze="nothing", data=data, trainer=trainer), HardBatches())
    rank = distributed.rank_and_world()[0]
    (folder / f"{world}-{rank}.json").write_text(json.dumps(recorder.samples), encoding="utf-8")
    distributed.exit_process()


if __name__ == "__main__":
    main()
