"""Run programs in processes that have imported everything already, because importing torch takes seconds.

A server that has done nothing but import is forked for each program. The fork gets the arguments, the folder, the
environment and the output files that a new process would get. Tests of the start itself use a new interpreter instead.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])
SHARED = "LIT_CLIP_FORK_SERVER"  # address of a server that the processes of pytest-xdist share


class Program(NamedTuple):
    """A program to run in a process.

    Attributes:
        function: the function to call.
        words: the command line, starting with the program's name.
        folder: the working folder.
        environment: the complete environment.
    """

    function: Callable[[], None]
    words: Sequence[str]
    folder: Path
    environment: dict[str, str]


def start_server() -> None:
    """Start the server, which imports modules from the current folder, unless one is running."""
    server: Any = forkserver._forkserver
    if SHARED in os.environ and server._forkserver_address is None:
        server._forkserver_address = os.environ[SHARED]
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # the server lives as long as who started it
        server.ensure_running = lambda: None
    with chdir(ROOT), patch.dict(os.environ, HF_HUB_OFFLINE="1"):
        server.ensure_running()


def share_server() -> None:
    """Start the server for the processes that this one starts, too."""
    start_server()
    if sys.version_info < (3, 14):  # whose servers also want a key
        os.environ[SHARED] = forkserver._forkserver._forkserver_address  # pyright: ignore


def run(programs: Sequence[Program], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    """Run programs at once, each to its end.

    Raises:
        subprocess.TimeoutExpired: one did not end in time; all are killed then.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        files = [[f"{folder}/{number}_{stream}" for stream in ("out", "err")] for number in range(len(programs))]
        processes = [
            CONTEXT.Process(target=become, args=(program, *streams))
            for program, streams in zip(programs, files, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout)
            late = [program for program, process in zip(programs, processes, strict=True) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [
            [Path(stream).read_text(encoding="utf-8", errors="surrogateescape") for stream in two] for two in files
        ]
    if late:
        raise subprocess.TimeoutExpired(late[0].words, timeout, str(texts))
    return [
        subprocess.CompletedProcess(program.words, process.exitcode or 0, *text)
        for program, process, text in zip(programs, processes, texts, strict=True)
    ]


@contextmanager
def running(program: Program, out: Path, err: Path) -> Iterator[BaseProcess]:
    """Run a program beside the test, which may send it signals; it is killed if it has not ended in the end."""
    start_server()
    process = CONTEXT.Process(target=become, args=(program, str(out), str(err)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def become(program: Program, out: str, err: str) -> None:
    """Become the program, in the child process."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.environment)
    tempfile.tempdir = None  # the server's
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    sys.argv = list(program.words)
    sys.modules["__main__"] = ModuleType("__main__")  # instead of pytest's
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in any other process on Linux
    forkserver._forkserver.ensure_running = lambda: None  # the one that made this process makes those it runs
    try:
        program.function()
    finally:
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()


def command() -> None:
    """Run ``lit-clip``."""
    from lit_clip.cli.main import main

    main()


def command_with_few_files(limit: int) -> None:
    """Run ``lit-clip`` with a limit of open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    command()


def command_without_errors() -> None:
    """Run ``lit-clip`` without a stream of errors, as after ``2>&-``."""
    os.close(2)
    sys.stderr = sys.__stderr__ = None  # pyright: ignore[reportAttributeAccessIssue]  # as Python does at its start
    command()


def command_with_progress() -> None:
    """Run ``lit-clip`` with a line at every chance, where others write the first after seconds."""
    from lit_clip.tools import console

    console.FIRST = console.EVERY = 0.0
    command()


def script() -> None:
    """Run the file that the command line names, which can import its neighbours."""
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def script_with_small_model() -> None:
    """Run the file that the command line names; the ViT of examples has a thirtieth of its parameters."""
    from lit_clip.models import registry

    config = registry._TINY["ViT-tiny-16-64"].to_dict()
    config["image"] |= {"width": 32, "layers": 1, "heads": 1}
    config["text"] |= {"width": 8, "layers": 1, "heads": 1}
    registry._TINY["ViT-tiny-16-64"] = registry.CLIPConfig.from_dict(config)
    script()


def script_that_starts_lit_clip() -> None:
    """Run the file that the command line names; when it runs ``python -m lit_clip``, that is a fork too."""

    def run_a_fork(words: Sequence[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words[:3] == [sys.executable, "-m", "lit_clip"], words
        return run([Program(command, ["lit-clip", *words[3:]], Path.cwd(), env)], timeout=300)[0]

    with patch("subprocess.run", run_a_fork):
        script()
