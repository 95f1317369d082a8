"""Checkpoint files: complete or absent, and the newest complete one is found."""

import io
import os
import resource
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.tools.atomic import exchange, remove
from lit_clip.tools.messages import user_error
from lit_clip.training.lightning.checkpoint_io import (
    WholeCheckpointIO,
    load_the_same_checkpoint,
    newest_checkpoint,
    put_in_place,
    remove_after_writing,
)
from tests.helpers import forks
from tests.test_module import data_for, trainer

MODULE = "lit_clip.training.lightning.checkpoint_io"
CHECKPOINT = {"global_step": 7, "optimizer_states": [], "state_dict": {"weight": torch.arange(300_000.0)}}


def test_a_saved_checkpoint_loads_and_is_the_only_file(tmp_path: Path) -> None:
    checkpoint_io = WholeCheckpointIO()
    for step in (1, 2):  # the second replaces the first
        checkpoint_io.save_checkpoint({**CHECKPOINT, "global_step": step}, tmp_path / "new folder" / "last.ckpt")
    assert os.listdir(tmp_path / "new folder") == ["last.ckpt"]
    checkpoint = checkpoint_io.load_checkpoint(tmp_path / "new folder" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert torch.equal(checkpoint["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"callbacks": {"Fine": {"seen": [1]}, "Counts": {"seen": np.zeros(3)}}}, "Counts"),
        ({"path": Path("a")}, "path"),
    ],
)
def test_a_state_that_no_command_would_open_is_named_and_the_previous_file_is_kept(
    entries: dict[str, Any], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    with pytest.raises(InputError, match=f"the state of {name} holds .*; have its state_dict return tensors and plain"):
        WholeCheckpointIO().save_checkpoint({**CHECKPOINT, "global_step": 8, **entries}, path)
    assert torch.load(path, weights_only=True)["global_step"] == 7
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_opened_is_named_where_the_newest_is_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**CHECKPOINT, "callbacks": {"Counts": {"seen": np.zeros(3)}}}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt: passed over, as it holds more than tensors and plain values"):
        assert newest_checkpoint([tmp_path]) is None


def _save_with_a_limit(path: str, bytes_allowed: int) -> None:
    """Imitate a full disk by limiting the size of files; exit with 3 after an error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, bytes_allowed))
    try:
        WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    except InputError as error:
        Path(f"{path}.error").write_text(str(error), encoding="utf-8")
        os._exit(3)


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({**CHECKPOINT, "global_step": 6}, path)
    forks.start_server()
    process = forks.CONTEXT.Process(target=_save_with_a_limit, args=(str(path), 500_000))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    message = Path(f"{path}.error").read_text(encoding="utf-8")
    assert message.startswith(f"{path}: the checkpoint cannot be written (")
    assert message.endswith("; the previous one is kept")
    assert torch.load(path, weights_only=True)["global_step"] == 6
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.ckpt.error"]


def _lost(*_: object) -> None:
    """As torch's handler of SIGCHLD when a data worker is lost."""
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_signal_while_writing_is_not_reported_as_a_full_disk(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    number = signal.SIGINT if error is KeyboardInterrupt else signal.SIGUSR2
    before = signal.signal(number, signal.default_int_handler if error is KeyboardInterrupt else _lost)
    request.addfinalizer(lambda: signal.signal(number, before))

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 500_000:
                os.kill(os.getpid(), number)
            return super().write(data)

    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(error) as raised:
        WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    monkeypatch.undo()
    if error is RuntimeError:
        assert "a data worker was killed" in str(user_error(raised.value))
    assert torch.load(path, weights_only=True)["global_step"] == 7
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_reason_is_that_of_the_disk_while_a_signal_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    try:
        raise SystemExit  # as Preemption saves: while Lightning handles the signal's exception
    except SystemExit:
        with pytest.raises(InputError, match=r"last.ckpt: the checkpoint cannot be written \(File exists\)"):
            WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "checkpoints/last.ckpt")


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("former", ["nothing", "file", "folder", "link"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_file_or_folder_takes_the_place_of_what_was_there(
    tmp_path: Path, new: str, former: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a disk that cannot exchange two names."""
    if not exchanges:
        monkeypatch.setattr(f"{MODULE}.exchange", lambda one, other: False)
    whole, part, linked = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.tmp", tmp_path / "step=2.ckpt"
    for path, kind in ((whole, former), (part, new), (linked, "folder")):
        if kind == "folder":
            path.mkdir()
            (path / "rank_0.safetensors").touch()
        elif kind == "link":
            path.symlink_to("step=2.ckpt")
        elif kind == "file":
            torch.save({"of": path.name}, path)
    put_in_place(part, whole)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt"]
    assert os.listdir(linked) == ["rank_0.safetensors"]
    assert not whole.is_symlink()
    assert whole.is_dir() if new == "folder" else torch.load(whole) == {"of": part.name}


def test_a_folder_gives_way_to_another_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed at any time leaves one of the two."""
    whole, part = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.tmp"
    for path in (whole, part):
        path.mkdir()
        (path / path.name).touch()
    if not (exchange(whole, part) and exchange(whole, part)):
        pytest.skip("this system or disk cannot exchange two names")
    steps: list[list[str]] = []
    for name, call in (("exchange", exchange), ("remove", remove)):

        def noted(*paths: Path, call: Any = call) -> Any:
            result = call(*paths)
            steps.append(os.listdir(whole))
            return result

        monkeypatch.setattr(f"{MODULE}.{name}", noted)
    monkeypatch.delattr(Path, "rename")
    put_in_place(part, whole)
    assert steps == [[part.name], [part.name]]
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_whole_checkpoint_is_mapped_when_a_run_resumes_from_it(tmp_path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path := tmp_path / "last.ckpt")
    run = trainer(tmp_path)
    load_the_same_checkpoint(run)
    checkpoint = run.strategy.load_checkpoint(path, weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_newest_checkpoint_has_the_most_steps_of_the_newest_run_and_can_be_resumed(tmp_path: Path) -> None:
    assert newest_checkpoint([tmp_path, tmp_path / "nowhere"]) is None
    checkpoint_io = WholeCheckpointIO()
    for run, name, step in (("version_0", "last", 30), ("version_1", "last", 20), ("version_1", "best", 10)):
        time.sleep(0.01)
        checkpoint_io.save_checkpoint(
            {**CHECKPOINT, "global_step": step}, tmp_path / run / "checkpoints" / f"{name}.ckpt"
        )
    expected = tmp_path / "version_1/checkpoints/last.ckpt"  # an older run may have gone further
    assert newest_checkpoint([tmp_path]) == expected
    data = expected.read_bytes()
    time.sleep(0.01)
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])  # a crash while writing
    with pytest.warns(UserWarning, match=r"cut.ckpt: incomplete or damaged; .*version_1/checkpoints/last.ckpt is the"):
        newest_checkpoint([tmp_path])
    os.utime(tmp_path / "cut.ckpt", (0, 0))
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    os.utime(tmp_path / "text.ckpt", (0, 0))
    torch.save({"global_step": 99, "state_dict": {}}, tmp_path / "weights.ckpt")
    torch.save([1, 2, 3], tmp_path / "list.ckpt")
    assert newest_checkpoint([tmp_path]) == expected
    time.sleep(0.01)
    checkpoint_io.save_checkpoint({**CHECKPOINT, "global_step": 30}, tmp_path / "version_2" / "last.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "version_2/last.ckpt"
    checkpoint_io.save_checkpoint({**CHECKPOINT, "global_step": 30}, tmp_path / "version_2" / "best.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "version_2/last.ckpt"  # best would look older than it is
    assert newest_checkpoint([tmp_path / "version_0", tmp_path / "cut.ckpt"]) is not None


def test_a_clock_that_was_ahead_does_not_hide_what_is_saved_later(tmp_path: Path) -> None:
    def save(run: str, step: int) -> Path:
        path = tmp_path / run / f"step={step}.ckpt"
        WholeCheckpointIO().save_checkpoint({**CHECKPOINT, "global_step": step}, path)
        return path

    ahead = time.time() + 86400
    for number, (run, step) in enumerate((("version_0", 9), ("version_1", 3), ("version_1", 6))):
        time.sleep(0.01)
        os.utime(save(run, step), (ahead, ahead + number))
    with pytest.warns(UserWarning, match=r"version_1/step=6.ckpt: dated in the future, so a clock was wrong"):
        assert newest_checkpoint([tmp_path]) == tmp_path / "version_1/step=6.ckpt"
    assert newest_checkpoint([tmp_path]) == tmp_path / "version_1/step=6.ckpt"  # in their order, without a warning
    time.sleep(0.01)
    later = save("version_2", 7)
    assert newest_checkpoint([tmp_path]) == later


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zeros", "a byte", "folder", "missing"])
def test_a_file_that_is_no_checkpoint_is_one_line_from_python_too(
    damage: str, tiny_checkpoint: Path, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    path, data = tmp_path / "bad.ckpt", tiny_checkpoint.read_bytes()
    start = data.index(b"data.pkl") + 200
    damaged = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(1000),
        "a byte": data[:start] + bytes([data[start] ^ 255]) + data[start + 1 :],
    }
    if damage in damaged:
        path.write_bytes(damaged[damage])
    elif damage == "folder":
        path.mkdir()
    module = LitCLIP(tiny_config)
    with pytest.raises(
        InputError, match=r"^[^\n]*bad.ckpt: (not a readable checkpoint \(|there is no such file)[^\n]*$"
    ):
        trainer(tmp_path, max_epochs=1).fit(module, data_for(module, caption_table), ckpt_path=path, weights_only=True)


class Slow(WholeCheckpointIO):
    """Write after a while, and note which checkpoints there were until then; or fail."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.before: list[list[str]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        time.sleep(0.3)
        self.before.append(sorted(os.listdir(Path(path).parent)))
        if Path(path).name == self.failing:
            raise InputError(f"{path}: full")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_another_thread_removes_the_one_kept_checkpoint_after_the_next_is_on_the_disk(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """Lightning's plugin removes it at once: a kill would leave none, and one not yet written would stay for good."""
    module, writer = LitCLIP(tiny_config), Slow()
    newest = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1)
    fitting = trainer(tmp_path, max_steps=3, callbacks=[newest], plugins=[AsyncCheckpointIO(writer)])
    fitting.fit(module, data_for(module, caption_table))
    assert writer.before == [[], ["step=1.ckpt"], ["step=2.ckpt"]]
    assert os.listdir(tmp_path) == ["step=3.ckpt"]  # all is written when fit ends


@pytest.mark.parametrize("failing", ["", "2.ckpt"], ids=["slow", "failing"])
def test_a_checkpoint_is_kept_while_or_if_another_thread_has_not_written_the_next(failing: str, tmp_path: Path) -> None:
    plugin: Any = AsyncCheckpointIO(Slow(failing))
    remove_after_writing(_WrappingCheckpointIO(plugin))  # wherever it is
    plugin.save_checkpoint(CHECKPOINT, tmp_path / "1.ckpt")
    plugin.teardown()
    plugin.save_checkpoint(CHECKPOINT, tmp_path / "2.ckpt")
    plugin.remove_checkpoint(tmp_path / "1.ckpt")
    assert "1.ckpt" in os.listdir(tmp_path)
    with pytest.raises(InputError, match="full") if failing else nullcontext():
        plugin.teardown()
    assert os.listdir(tmp_path) == ["1.ckpt" if failing else "2.ckpt"]


def test_a_link_to_a_removed_checkpoint_is_not_looked_into(tmp_path: Path) -> None:
    """``save_last: link`` leaves one if the run is killed between removing the last and linking the next."""
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "new.ckpt")
    (tmp_path / "last.ckpt").symlink_to("old.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "new.ckpt"
