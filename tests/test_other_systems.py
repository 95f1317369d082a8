"""macOS and Windows, as far as Linux can stand in for them: their absent modules and functions are taken away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_clip.tools import hardware, processes
from lit_clip.tools.reading import read_at
from tests.conftest import ROOT
from tests.helpers import forks

# Import this first, also in a spawned worker. Other packages keep these modules: they have rules of their own.
OTHER_SYSTEM = """
import builtins, mmap, os, signal, sys
import lightning.pytorch, torch  # which know other systems
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios"}
real = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    caller = str((globals or {}).get("__name__")).partition(".")[0]
    if name in ABSENT and caller in ("lit_clip", "callbacks", "datamodules"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = without
functions = {os: ["pread", "pwrite", "posix_fallocate", "sched_getaffinity", "fork"], mmap: ["MAP_PRIVATE"]}
functions[signal] = ["sigwaitinfo"]
for module, names in functions.items():
    for name in names:
        delattr(module, name)
def no_proc(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(f"no {arguments[0]}")
sys.addaudithook(no_proc)
"""

IMPORT_ALL = """
import importlib, pathlib, sys
short = ("lit_clip", "callbacks", "datamodules")
for name in [name for name in sys.modules if name.partition(".")[0] in short]:
    del sys.modules[name]
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("lit_clip")]
import other_system
root = pathlib.Path(sys.argv[1])
files = [path.relative_to(root).with_suffix("") for package in short for path in (root / package).rglob("[!_]*.py")]
names = [".".join(path.parts) if path.parts[0] == "lit_clip" else ".".join(("lit_clip", *path.parts)) for path in files]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

FIT = """
import other_system
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from lit_clip.cli.main import main
    main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"other_system": OTHER_SYSTEM, "import_all": IMPORT_ALL, "fit": FIT}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return tmp_path


def test_every_module_is_imported_without_modules_and_functions_of_linux(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    program = forks.Program(forks.script, [str(folder / "import_all.py"), str(ROOT)], folder, environment)
    (done,) = forks.run([program], timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250


@pytest.mark.slow
def test_a_fit_with_spawned_workers_and_without_proc_trains_saves_and_reports(
    folder: Path, caption_table: Path
) -> None:
    model = {"embed_dim": 8, "image": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "heads": 1}}
    model["text"] = {"context_length": 16, "width": 8, "layers": 1, "heads": 1}
    words = ["fit", "--data.train", str(caption_table), "--data.batch_size", "16", "--data.num_workers", "1"]
    words += ["--model.architecture", json.dumps(model), "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    words += ["--trainer.limit_val_batches", "0", "--trainer.logger.class_path", "CSVLogger"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, str(folder / "fit.py"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "checkpoint:" in done.stdout + done.stderr
    assert list(folder.rglob("*.ckpt"))


def test_memory_is_unknown_where_neither_proc_nor_resource_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    known = hardware.peak_of_process()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert hardware.peak_of_process() == 0 < known


def test_a_part_of_a_file_is_read_without_pread_and_without_moving_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(10)))
    with (tmp_path / "file").open("rb") as file:
        found = [read_at(file, 3, 5)]
        monkeypatch.delattr(os, "pread")
        found += [read_at(file, 3, 5), read_at(file, 9, 8)]
        assert found == [b"\x05\x06\x07", b"\x05\x06\x07", b"\x08\x09"]
        assert file.tell() == 0


def test_on_windows_no_signal_is_sent_to_see_whether_a_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signal 0 is Ctrl-C there."""
    monkeypatch.setattr(processes.os, "name", "nt")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    assert not processes._has_ended(os.getpid())
