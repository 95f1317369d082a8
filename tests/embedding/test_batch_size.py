"""The batch size that is found by trying: as large as makes the encoder faster and as memory permits."""

import json
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_clip import load_model
from lit_clip.cli.subcommands import command_parser, run_command
from lit_clip.commands.embed import embed
from lit_clip.embedding import batch_size
from lit_clip.embedding.batch_size import Choice, Trial, fastest_batch_size, image_batch_size
from lit_clip.embedding.encode import start_processes
from lit_clip.errors import InputError
from lit_clip.evaluation.store import FeatureStore, Settings
from lit_clip.tools import hardware
from tests.conftest import lit_clip_command
from tests.helpers.small_sets import Shades


def device(per_batch: float, per_sample: float, fits: float = float("inf")) -> tuple[Callable[[int], float], list[int]]:
    """Seconds of an encoder on an imagined device, and the batches that it was given."""
    tried: list[int] = []

    def seconds(size: int) -> float:
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("full")
        return per_batch + per_sample * size

    return seconds, tried


@pytest.mark.parametrize(
    ("per_batch", "per_sample", "best", "reason"),
    [
        (0.0, 0.001, 8, "1000 a second, 1000 with 16"),  # no batch is faster than another
        (0.008, 0.001, 128, "941 a second, 970 with 256"),  # that is 3 % more; from 64 to 128 it was 6 %
        (0.3, 0.002, 512, "it takes 1.3 seconds, 387 a second"),  # from 256 it was 23 %, and would be 12 %
        (0.5, 1e-6, 1024, "1024 is the most: no larger batch is tried"),  # every sample is free
    ],
)
def test_a_batch_is_doubled_while_that_is_worth_it(per_batch: float, per_sample: float, best: int, reason: str) -> None:
    seconds, tried = device(per_batch, per_sample)
    assert fastest_batch_size(seconds) == Choice(best, reason)
    sizes = list(dict.fromkeys(tried))
    assert sizes == [8 * 2**n for n in range(len(sizes))]
    assert len(tried) - len(sizes) == ("with" in reason)  # what seems no faster is timed twice


def test_a_batch_beside_which_another_program_ran_is_timed_again() -> None:
    seconds, _ = device(0.008, 0.001)
    slowed: list[int] = []

    def once(size: int) -> float:
        slowed.append(size)
        return seconds(size) * (10 if slowed.count(size) == 1 and size == 32 else 1)

    assert fastest_batch_size(once).batch_size == 128
    assert slowed.count(32) == 2


@pytest.mark.parametrize(("fits", "best"), [(1, 1), (3, 2), (7, 4), (8, 8), (100, 64), (512, 512)])
def test_memory_has_the_last_word(fits: int, best: int) -> None:
    seconds, tried = device(0.5, 1e-6, fits)
    assert fastest_batch_size(seconds) == Choice(best, f"memory is too small for {2 * best}")
    assert tried.count(2 * best) == 1


def test_memory_for_no_sample_is_one_line() -> None:
    with pytest.raises(InputError, match="--batch_size auto: there is not memory enough for a single sample"):
        fastest_batch_size(device(0.5, 1e-6, fits=0)[0])


@pytest.mark.parametrize(("most", "best"), [(1, 1), (5, 5), (20, 16), (64, 64)])
def test_no_size_is_above_the_most(most: int, best: int) -> None:
    seconds, tried = device(0.5, 1e-6)
    assert fastest_batch_size(seconds, most=most, why_most="so") == Choice(best, f"{most} is the most: so")
    assert max(tried) == best


class Process:
    """A process whose memory is a number: what it has, and the most it has had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, has: int, peak: int, available: int) -> None:
        self.has, self.peak = has, peak
        monkeypatch.setattr(hardware, "of_process", lambda: self.has)
        monkeypatch.setattr(hardware, "peak_of_process", lambda: self.peak)
        monkeypatch.setattr(hardware, "available", lambda: available)

    def encode(self, batch: Tensor) -> None:
        self.peak = max(self.peak, self.has + 10 * len(batch))


@pytest.mark.parametrize(("available", "largest"), [(1000, 32), (640, 32), (639, 16), (10**6, 1024)])
def test_a_cpu_does_not_try_what_would_take_half_of_its_memory(
    available: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of 32 it needs 320, which is half of 640."""
    process = Process(monkeypatch, has=100, peak=150, available=available)
    monkeypatch.setattr(batch_size, "WORTH", -1e9)  # whatever the seconds
    monkeypatch.setattr(batch_size, "AT_LEAST", 0.0)
    tried: list[int] = []

    def encode(batch: Tensor) -> None:
        tried.append(len(batch))
        process.encode(batch)

    choice = fastest_batch_size(Trial(encode, lambda size: torch.zeros(size), torch.device("cpu")))
    assert choice.batch_size == max(tried) == largest


@pytest.mark.parametrize(("processes", "largest"), [(2, 32), (4, 16)])
def test_a_cpus_memory_is_shared_by_its_processes(
    processes: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(monkeypatch, has=100, peak=150, available=1280)
    monkeypatch.setattr(batch_size, "WORTH", -1e9)
    monkeypatch.setattr(batch_size, "AT_LEAST", 0.0)
    trial = Trial(process.encode, lambda size: torch.zeros(size), torch.device("cpu"), processes)
    assert fastest_batch_size(trial).batch_size == largest


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_is_refused_in_other_words_is_full_too(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "AT_LEAST", 0.0)

    def encode(batch: Tensor) -> None:
        if len(batch) > 16:
            raise RuntimeError(message)

    monkeypatch.setattr(batch_size, "WORTH", -1e9)
    choice = fastest_batch_size(Trial(encode, lambda size: torch.zeros(size), torch.device("cpu")))
    assert choice == Choice(16, "memory is too small for 32")


def test_another_error_ends_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trainer = load_model(tiny_checkpoint), start_processes(1, "cpu", "32-true")

    def encode(images: Tensor) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(model, "encode_image", encode)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        image_batch_size(model, trainer, num_workers=0)


def test_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = hardware.available()
    assert 0 < hardware.of_process() <= 1.01 * hardware.peak_of_process()  # Linux counts roughly
    monkeypatch.setattr(hardware, "GROUP", tmp_path)
    assert hardware.available() == pytest.approx(free, rel=0.2)  # not in a container
    for name, text in (("max", "3000000\n"), ("current", "2500000\n"), ("stat", "anon 9\ninactive_file 400000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert hardware.available() == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available() == pytest.approx(free, rel=0.2)


def test_workers_all_have_a_batch_and_room_for_two(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, trainer = load_model(tiny_checkpoint), start_processes(1, "cpu", "32-true")
    monkeypatch.setattr(batch_size, "WORTH", -1e9)
    monkeypatch.setattr(batch_size, "LONG_BATCH", 1e9)
    monkeypatch.setattr(batch_size, "AT_LEAST", 0.0)
    monkeypatch.setattr(batch_size, "MOST", 64)
    assert image_batch_size(model, trainer, num_workers=0) == 64
    assert "64 is the most: no larger batch is tried" in capsys.readouterr().err
    assert image_batch_size(model, trainer, num_workers=4, images=70) == 16  # 17 each
    assert "17 is the most: there are 70 images for 4 to read" in capsys.readouterr().err
    assert image_batch_size(model, trainer, num_workers=4, images=3) == 1
    monkeypatch.setattr(hardware, "available_to_workers", lambda: 2 * (3 * 32 * 32 * 4) * 40)  # half is for others
    assert image_batch_size(model, trainer, num_workers=0) == 64
    assert image_batch_size(model, trainer, num_workers=1) == 16  # 2 of 20 at most
    assert "20 is the most: 1 data workers share the memory of /dev/shm" in capsys.readouterr().err
    assert image_batch_size(model, trainer, num_workers=4) == 5
    monkeypatch.setattr(type(trainer), "num_devices", 2)
    assert image_batch_size(model, trainer, num_workers=2) == 5


# On the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 images of noise and as many texts."""
    noise = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        image = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        image.save(tmp_path / f"photos/{number}.png")
    (tmp_path / "texts.txt").write_text("\n".join(f"{'very ' * (n % 7)}small cat {n}" for n in range(40)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", [["photos"], ["--texts", "texts.txt"]])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_features_are_those_of_a_fixed_size(
    what: list[str], precision: str, folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = []
    for size in ("3", "auto"):
        words = ["--model", str(tiny_checkpoint), "--output", f"{size}.npy", "--batch_size", size]
        run_command(["embed", *what, *words, "--num_workers=0", "--accelerator=cpu", "--precision", precision])
        features.append(np.load(f"{size}.npy"))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--batch_size ")]
        assert len(said) == (size == "auto")
    assert features[0].shape == (40, 16)
    # bfloat16 has 8 bits: batches of other sizes may round otherwise.
    assert np.abs(features[0] - features[1]).max() < (1e-6 if precision == "32-true" else 2e-2)


def test_two_ranks_have_one_size(folder: Path, tiny_checkpoint: Path) -> None:
    words = ["--texts", "texts.txt", "--model", str(tiny_checkpoint), "--accelerator", "cpu", "--num_workers", "0"]
    run_command(["embed", *words, "--output", "one.npy", "--batch_size", "3"])
    options = ["--output", "two.npy", "--batch_size", "auto", "--devices", "2"]
    result = lit_clip_command(folder, "embed", *words, *options)
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("--batch_size ")]
    assert int(said.removeprefix("--batch_size ").partition(":")[0]) in (8, 16)  # 20 texts each
    keys = [json.loads(Path(f"{name}.keys.json").read_text())["keys"] for name in ("one", "two")]
    assert keys[0] == keys[1]
    assert np.abs(np.load("one.npy") - np.load("two.npy")).max() < 1e-6


def test_an_evaluation_tries_once_and_has_the_same_features(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, sets = load_model(tiny_checkpoint), [Shades("", "test"), Shades("", "more", 20)]
    found: list[list[Any]] = []
    for size in (7, "auto"):
        store = FeatureStore(model, tmp_path / str(size), Settings(size, num_workers=0, accelerator="cpu"))
        store.start()
        for number, images in enumerate(sets):
            store.compute(images, f"{number}")
        found.append([store.read(images) for images in sets])
    assert capsys.readouterr().err.count("--batch_size ") == 1
    for ours, theirs in zip(*found, strict=True):
        assert np.abs(ours.after - theirs.after).max() < 1e-6
        assert np.abs(ours.before - theirs.before).max() < 1e-5


@pytest.mark.parametrize(("typed", "meant"), [("64", 64), ("auto", "auto"), ("many", None), ("1.5", None)])
def test_a_number_or_auto_can_be_typed(typed: str, meant: int | str | None) -> None:
    parser, words = command_parser("embed", embed), ["--model=a", "--output=b.npy", f"--batch_size={typed}"]
    if meant is None:
        with pytest.raises(ArgumentError, match="batch_size"):
            parser.parse_args(words)
    else:
        assert parser.parse_args(words).batch_size == meant
