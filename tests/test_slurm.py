"""Jobs by a real SLURM, of two machines that are this one: ``make test-slurm``."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY_YAML, lit_clip_command
from tests.helpers.slurm import Slurm, slurm, wait_for, why_no_slurm

REASON = why_no_slurm()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

IMAGES = 6000  # files of as many names; enough that a machine is lost in the middle
FIT = (
    "lit-clip fit --data.train pairs.csv --data.val pairs.csv --data.global_batch_size 24 --data.num_workers 0 "
    "--model.architecture tiny.yaml --trainer.accelerator cpu --trainer.precision 32-true --trainer.max_epochs 3"
)
EMBED = "lit-clip embed images --model tiny.ckpt --output features.npy --batch_size 1 --num_workers 0 --accelerator cpu"
RANKS = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --job-name=fit --signal=USR1@60\n"


@pytest.fixture
def cluster(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Slurm]:
    """A SLURM, whose jobs find images, a table of sixty of them, and a model."""
    jobs = tmp_path / "jobs"
    (jobs / "images").mkdir(parents=True)
    for number in range(60):
        Image.new("RGB", (40, 40), (4 * number, 250 - 4 * number, 0)).save(jobs / f"images/{number}.png")
    for number in range(60, IMAGES):
        (jobs / f"images/{number}.png").hardlink_to(jobs / f"images/{number % 60}.png")
    rows = "".join(f"images/{number}.png,number {number}\n" for number in range(60))
    (jobs / "pairs.csv").write_text(f"image,caption\n{rows}", encoding="utf-8")
    (jobs / "tiny.yaml").write_text(TINY_YAML, encoding="utf-8")
    (jobs / "tiny.ckpt").symlink_to(tiny_checkpoint)
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", jobs) as running:
        yield running


def weights(jobs: Path) -> dict[str, torch.Tensor]:
    """Return the last weights of the newest run in a folder."""
    return torch.load(max(jobs.rglob("last.ckpt")), weights_only=True)["state_dict"]  # of version_1, not version_0


def test_a_run_on_two_machines_that_is_requeued_has_the_weights_of_one_process(cluster: Slurm) -> None:
    options = "--trainer.devices 2 --trainer.num_nodes 2 --trainer.max_epochs 40 --trainer.default_root_dir run"
    job = cluster.submit(f"{RANKS}srun {FIT} {options}")
    wait_for(lambda: "expected time" in cluster.log(job))
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "SLURM was asked to run the job again" in cluster.log(job))
    wait_for(lambda: cluster.state(job) == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for two minutes
    wait_for(lambda: cluster.state(job) == "COMPLETED")
    assert cluster.log(job).count("Restored all states from the checkpoint at run/hpc_ckpt_1.ckpt") == 1
    alone = cluster.jobs.parent / "alone"
    alone.mkdir()
    words = f"{FIT} --trainer.devices 1 --trainer.max_epochs 40".split()[1:]
    for name in ("pairs.csv", "images", "tiny.yaml"):
        (alone / name).symlink_to(cluster.jobs / name)
    done = lit_clip_command(alone, *words)
    assert done.returncode == 0, done.stderr
    ours, expected = weights(cluster.jobs), weights(alone)
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():  # a step moves a weight by 1e-3; the gradient of keys' biases is rounding
        assert torch.allclose(ours[name], weight, atol=2e-4), name


def test_a_run_ends_when_one_of_its_ranks_does(cluster: Slurm) -> None:
    job = cluster.submit(f"{RANKS}srun {FIT} --trainer.devices 2 --trainer.num_nodes 2 --trainer.max_epochs 9000")
    wait_for(lambda: "expected time" in cluster.log(job))
    for process in cluster.having("SLURM_PROCID", "3"):
        process.kill()
    wait_for(lambda: cluster.state(job) == "FAILED", seconds=60)
    assert "another process has ended" in cluster.log(job)


def test_a_script_without_srun_is_told_to_write_it(cluster: Slurm) -> None:
    job = cluster.submit(f"{RANKS}{FIT} --trainer.devices 2 --trainer.num_nodes 2")
    wait_for(lambda: cluster.state(job) == "FAILED")
    line = "SLURM starts 1 of the 4 processes (2 devices x 2 nodes): give the job --nodes=2 --ntasks-per-node=2"
    assert cluster.log(job).splitlines()[-1].startswith(f"lit-clip: error: {line} and write srun before lit-clip")


def test_an_array_of_shares_has_the_bytes_of_one_process_though_a_machine_is_lost(cluster: Slurm) -> None:
    array = "#!/bin/bash\n#SBATCH --array=1-2 --nodes=1 --ntasks-per-node=2 --cpus-per-task=2 --requeue\n"
    share = "--devices 2 --share $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    job = cluster.submit(f"{array}srun {EMBED} {share}")
    join = cluster.submit(f"#!/bin/bash\n{EMBED}\n", f"--dependency=afterany:{job}")
    wait_for(lambda: "encoding (process" in cluster.log(f"{job}_2"))
    node = cluster.run("squeue", "--noheader", "--format=%N", "--jobs", f"{job}_2")
    cluster.lose(node)
    wait_for(lambda: cluster.state(f"{job}_2") == "PENDING")
    cluster.start(node)
    cluster.run("scontrol", "update", f"JobId={job}_2", "StartTime=now")
    wait_for(lambda: cluster.state(join) == "COMPLETED")
    assert "share 2/2 is finished" in cluster.log(f"{job}_2")
    joined = (cluster.jobs / "features.npy").read_bytes()
    assert np.load(cluster.jobs / "features.npy").shape[0] == IMAGES
    done = lit_clip_command(cluster.jobs, *EMBED.replace("features.npy", "alone.npy").split()[1:])
    assert done.returncode == 0, done.stderr
    assert (cluster.jobs / "alone.npy").read_bytes() == joined
