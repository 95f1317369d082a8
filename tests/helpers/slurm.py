"""A SLURM of two machines that are this one, for as long as a test needs it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import ROOT

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/slurm
CredType=auth/slurm
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=5
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def why_no_slurm() -> str | None:
    """Return why no SLURM can be started here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} are not installed"
    if any(process.info["name"] in PROGRAMS for process in psutil.process_iter(["name"])):
        return "another SLURM runs here, whose sockets this one would take"
    return None if os.geteuid() == 0 else "the tests do not run as root, as whom SLURM starts jobs"


class Slurm:
    """A running SLURM, and a folder for its jobs."""

    def __init__(self, folder: Path, jobs: Path) -> None:
        self.folder, self.jobs = folder, jobs
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        set_here = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **set_here, "MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}

    def run(self, *words: str) -> str:
        """Run one of SLURM's commands; return what it prints."""
        return subprocess.run(
            words, env=self.environment, cwd=self.jobs, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def submit(self, script: str, *words: str) -> str:
        """Submit a script whose output goes to ``JOB.log`` in the jobs' folder; return the job's id."""
        (self.jobs / "job.sh").write_text(script, encoding="utf-8")
        output = ["--output=%A_%a.log"] if "--array" in script else ["--output=%j.log"]
        return self.run("sbatch", "--parsable", "--open-mode=append", *output, *words, "job.sh")

    def state(self, job: str) -> str:
        """Return a job's state, such as ``RUNNING``."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)

    def log(self, name: str) -> str:
        """Return what a job has printed until now."""
        path = self.jobs / f"{name}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def start(self, node: str) -> None:
        """Start the daemon of one machine."""
        self.run("slurmd", "-N", node)

    def lose(self, node: str) -> None:
        """Kill all that runs on a machine, its daemons first: they would report how the rest ended."""
        tasks = self.having("SLURMD_NODENAME", node)
        steps = {parent for task in tasks if (parent := task.parent()) and parent.name().startswith("slurmstepd")}
        with suppress(FileNotFoundError, psutil.NoSuchProcess):  # it has not started, or has ended
            self.daemon(node).kill()
        for process in (*steps, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def daemon(self, name: str) -> psutil.Process:
        """Return the process of a machine's daemon, or of ``slurmctld``."""
        return psutil.Process(int((self.folder / f"{name}.pid").read_text()))

    def having(self, name: str, value: str) -> list[psutil.Process]:
        """Return processes of this SLURM's jobs by a variable, by which SLURM tells them where they are."""
        found, ours = [], self.environment["SLURM_CONF"]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                found += [process] if (variables.get("SLURM_CONF"), variables.get(name)) == (ours, value) else []
        return found


@contextmanager
def slurm(folder: Path, jobs: Path) -> Iterator[Slurm]:
    """Start SLURM with its files in a folder; end it, and all that its jobs started, at the end."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, ports=ports, folder=folder, nodes=NODES)
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "slurm.key").write_bytes(secrets.token_bytes(1024))
    (folder / "slurm.key").chmod(0o600)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    running = Slurm(folder, jobs)
    try:
        running.run("slurmctld", "-c")
        for node in NODES:
            running.start(node)
        wait_for(lambda: running.run("sinfo", "--noheader", "--format=%D %t") == "2 idle")
        yield running
    finally:
        with suppress(FileNotFoundError, psutil.NoSuchProcess):  # it has not started
            running.daemon("slurmctld").kill()
        for node in NODES:
            running.lose(node)


def wait_for(holds: Callable[[], bool], seconds: float = 150) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.2)
