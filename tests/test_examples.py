"""Every file of examples/ does what its first lines say, and a class in it can be named on the command line."""

import argparse
import ast
import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_clip
from lit_clip.locating import Locator
from tests.conftest import ROOT, TINY_YAML, lit_clip_command
from tests.helpers import forks

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LOSS = "train/loss"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, caption_table: Path) -> Run:
    """Run an example in a folder with all of them and a table; returns what it printed."""
    for example in EXAMPLES:
        shutil.copy(example, tmp_path)
    rows = caption_table.read_text(encoding="utf-8").replace("\n../", f"\n{caption_table.parent.parent}/")
    (tmp_path / "captions.csv").write_text(rows, encoding="utf-8")

    def run(*words: str) -> str:
        program = forks.Program(forks.script_with_small_model, words, tmp_path, {**os.environ, "COLUMNS": "200"})
        (done,) = forks.run([program], timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def curves(folder: Path) -> EventAccumulator:
    """Return what the only run in a folder logged to TensorBoard."""
    (file,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file)).Reload()


def first_image(table: Path) -> Path:
    return (table.parent / table.read_text(encoding="utf-8").splitlines()[1].split(",")[0]).resolve()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= (100 if example.stem == "plain_step" else 40)
    assert f"python {example.name} " in docstring


def test_train_prints_the_similarities_of_the_trained_model(run: Run, tmp_path: Path, caption_table: Path) -> None:
    names = ["tiger", "a photo of the sea"]
    image = first_image(caption_table)
    output = run("train.py", "captions.csv", str(image), *names).splitlines()[-2:]
    model = lit_clip.load_model(tmp_path / "trained.ckpt")
    pixels = model.preprocess(Image.open(image))[None]
    with torch.no_grad():
        expected = model.encode_image(pixels, True) @ model.encode_text(model.tokenizer(names), True).T
    assert output == [f"{value:.3f} {name}" for value, name in zip(expected[0], names, strict=True)]
    assert len(curves(tmp_path).Scalars("val/loss")) == 3


@pytest.mark.usefixtures("run")
def test_plain_pytorch_gives_the_losses_and_weights_of_fit(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that Lightning or the package does around the step changes what is learned."""
    shutil.copy(tiny_checkpoint, tmp_path / "start.ckpt")
    monkeypatch.syspath_prepend(tmp_path)
    plain = import_module("plain_step")
    words = (
        "fit --config table --recipe null --data.train captions.csv --data.batch_size 16 --data.num_workers 0 "
        "--data.augmentation [] --model.architecture null --model.pretrained start.ckpt --model.optimizer.lr 1e-3 "
        "--model.lr_scheduler.warmup_steps 5 --trainer.max_epochs -1 --trainer.max_steps 20 "
        "--trainer.log_every_n_steps 1 --trainer.accelerator cpu --trainer.precision 64-true --data.val captions.csv"
    )
    done = lit_clip_command(tmp_path, *words.split())
    assert done.returncode == 0, done.stdout + done.stderr
    model, losses = plain.train(tmp_path / "captions.csv", tmp_path / "start.ckpt", 20, torch.float64)
    found = [event.value for event in curves(tmp_path / "runs").Scalars(LOSS)]
    assert found == pytest.approx(losses, abs=1e-6)  # TensorBoard keeps float32
    (last,) = tmp_path.rglob("last.ckpt")
    start, trained = (torch.load(path)["state_dict"] for path in (tmp_path / "start.ckpt", last))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-9)
    assert max(float((trained[name] - start[name]).abs().max()) for name in start) > 1e-3


def test_own_loss_trains_its_temperature(run: Run, tmp_path: Path) -> None:
    run("own_loss.py", "captions.csv")
    scales = [event.value for event in curves(tmp_path).Scalars("train/own_scale")]
    assert scales[0] == pytest.approx(torch.tensor(3.0).exp().item())
    assert scales[1] != scales[0]


@pytest.mark.slow
def test_own_loss_on_the_command_line(run: Run, tmp_path: Path) -> None:
    command = "fit --data.train captions.csv --model.loss own_loss.Tempered --model.loss.initial 3"
    assert f"lit-clip {command}" in (ROOT / "examples/own_loss.py").read_text(encoding="utf-8")
    quick = "--data.batch_size 8 --data.num_workers 0 --trainer.max_steps 2 --trainer.log_every_n_steps 1"
    small = ["--trainer.accelerator", "cpu", "--model.architecture", TINY_YAML]
    done = lit_clip_command(tmp_path, *shlex.split(f"{command} {quick}"), *small)
    assert done.returncode == 0, done.stdout + done.stderr
    scale = curves(tmp_path).Scalars("train/own_scale")[0].value
    assert scale == pytest.approx(torch.tensor(3.0).exp().item())


def test_own_recipe_prints_what_it_chooses(run: Run) -> None:
    chosen = dict(line.split(maxsplit=2)[:2] for line in run("own_recipe.py", "captions.csv").splitlines())
    pairs = int(run("own_recipe.py", "captions.csv").partition(" pairs")[0].rsplit(maxsplit=1)[-1])
    assert int(chosen["data.global_batch_size"]) == min(256, max(2, pairs // 4))
    assert int(chosen["trainer.max_epochs"]) == 20_000 // pairs


def test_own_encoder_is_in_a_checkpoint_that_commands_open(run: Run, tmp_path: Path, caption_table: Path) -> None:
    run("own_encoder.py", "captions.csv")
    (tmp_path / "photos").mkdir()
    shutil.copy(first_image(caption_table), tmp_path / "photos/mine.png")
    words = ["--import", "own_encoder", "classify", "photos", "--model", "own_encoder.ckpt"]
    done = lit_clip_command(tmp_path, *words, "--classes", "tiger", "pizza")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine.png" in done.stdout


def test_own_source_gives_the_table_in_three_captions(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("own_source.py", "captions.csv")
    assert len(curves(tmp_path).Scalars(LOSS)) == 2
    inspected = lit_clip_command(
        tmp_path, "inspect", "{class_path: own_source.Prompted, init_args: {table: captions.csv}}"
    )
    assert "192" in inspected.stdout, inspected.stdout + inspected.stderr


def test_own_callback_logs_a_number_and_an_image(run: Run, tmp_path: Path) -> None:
    run("own_callback.py", "captions.csv")
    logged = curves(tmp_path)
    assert all(-1 <= event.value <= 1 for event in logged.Scalars("train/pair_similarity"))
    assert [image.step for image in logged.Images("train/worst_pair")] == [1, 2]


def test_own_zero_shot_set_is_evaluated(run: Run, tmp_path: Path) -> None:
    run("own_zero_shot_set.py", "captions.csv")
    assert len(curves(tmp_path).Scalars("zero_shot/mine/top1")) == 2
    assert [Image.open(sheet).width > 0 for sheet in tmp_path.rglob("zero_shot_mine.png")] == [True]


def test_fine_tune_trains_the_last_blocks_alone(run: Run, tmp_path: Path, overfitted: tuple[Path, Path]) -> None:
    run("fine_tune.py", str(overfitted[0]), "captions.csv")
    before = lit_clip.load_model(overfitted[0]).state_dict()
    after = lit_clip.load_model(tmp_path / "fine_tuned.ckpt").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {name.split("resblocks.")[1].split(".")[0] for name in changed if "resblocks" in name}
    assert blocks == {"1", "3"}  # the last of two and of four
    assert "visual.conv1.weight" not in changed


@pytest.mark.slow
def test_resume_gives_the_weights_of_an_uninterrupted_run(run: Run, tmp_path: Path) -> None:
    weights = []
    for runs in (["2"], ["1", "2"]):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for epochs in runs:
            run("resume.py", "captions.csv", epochs)
        weights.append(lit_clip.load_model(tmp_path / "runs/resumed/last.ckpt").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("signum", "saves"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_resume_saves_at_sigterm_and_not_at_ctrl_c(signum: int, saves: bool, run: Run, tmp_path: Path) -> None:
    words, out, err = ["resume.py", "captions.csv", "99"], tmp_path / "out", tmp_path / "err"
    environment = {**os.environ, "COLUMNS": "200"}
    program = forks.Program(forks.script_with_small_model, words, tmp_path, environment)
    with forks.running(program, out, err) as process:
        last, until = tmp_path / "runs/resumed/last.ckpt", time.monotonic() + 100
        while not last.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert process.pid is not None
        for _ in range(20 if signum == signal.SIGINT else 1):  # one that comes while torch writes a file is lost
            os.kill(process.pid, signum)
            process.join(60 if signum != signal.SIGINT else 3)
            if process.exitcode is not None:
                break
        assert process.exitcode == (128 + signum if saves else 1)
    assert ("saved step" in out.read_text(encoding="utf-8") + err.read_text(encoding="utf-8")) == saves
    batches = torch.load(last, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert saves or batches["is_last_batch"] or not batches["current"]["ready"]  # an epoch's end, or between epochs


@contextlib.contextmanager
def serving(folder: Path, model: str) -> Iterator[Callable[[str, bytes], tuple[int, dict[str, Any]]]]:
    """Run ``serve.py`` in a folder; yield a function that sends a query and a body, and returns status and answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = forks.Program(forks.script, ["serve.py", model, str(port)], folder, {**os.environ})

    def answer(query: str, body: bytes) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", f"/?{query}", body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    with forks.running(served, folder / "out", folder / "err") as server:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.is_alive()
            time.sleep(0.1)
        yield answer


def test_serve_answers_with_probabilities_and_refuses_what_is_too_large(
    run: Run, tmp_path: Path, overfitted: tuple[Path, Path], caption_table: Path
) -> None:
    """A real server over HTTP; ``run`` has copied the example."""
    data = first_image(caption_table).read_bytes()
    with serving(tmp_path, str(overfitted[0])) as answer:
        model, names = lit_clip.load_model(overfitted[0]), ["tiger", "pizza", "the sea"]
        texts = [f"a photo of a {name}." for name in names]
        expected = (model.logit_scale.exp() * model.similarity(first_image(caption_table), texts)[0]).softmax(0)
        status, found = answer("name=tiger&name=pizza&name=the%20sea", data)
        assert (status, list(found)) == (200, names)
        assert [*found.values()] == pytest.approx(expected.tolist(), abs=1e-5)
        for query, body in (
            ("name=tiger&name=pizza", b"no image"),
            ("name=tiger", data),  # which would have 100 % of every image
            ("name=tiger&name=tiger&name=pizza", data),
            ("", data),
            (f"name={'x' * 201}", data),
            ("&".join(["name=x"] * 101), data),
            ("name=tiger&name=pizza", b"x" * 10_000_001),
        ):
            with contextlib.suppress(ConnectionError):  # a body that is too large is not read to its end
                status, found = answer(query, body)
                assert (status, list(found)) == (400, ["error"])
        assert answer("name=tiger&name=pizza", data)[0] == 200


def test_locate_crops_what_the_image_shows_and_names_what_it_does_not(
    run: Run, tmp_path: Path, drawings: tuple[Path, Path, list[str]]
) -> None:
    checkpoint, folder, _ = drawings
    shutil.copy(folder / "pizza.png", tmp_path)
    printed = run("locate.py", str(checkpoint), "pizza.png", "pizza", "an aeroplane above a lake").splitlines()
    located = Locator(lit_clip.load_model(checkpoint), ["pizza", "an aeroplane above a lake"])(folder / "pizza.png")
    for number, (line, region) in enumerate(zip(printed, located.regions, strict=True)):
        crop, box = tmp_path / f"pizza_{number}.png", region.box((72, 72))
        assert (crop.name in line, "not seen" in line) == (region.seen, not region.seen)
        if box is not None:
            with Image.open(crop) as image:
                assert image.size == (box[2] - box[0], box[3] - box[1])
    assert any(region.seen for region in located.regions)


# The page for those who come from open_clip.


PAGE = ROOT / "docs/from_open_clip.md"


# Of open_clip 4's usage, beside those of 3.3, and those that it has no more.
NEW_IN_4 = """
    audio-ext pretrained-audio audio-fill audio-trunc audio-fusion audio-int16-normalize audio-zeroshot-dataset
    audio-zeroshot-split audio-zeroshot-audio-key audio-zeroshot-target-key audio-zeroshot-class-key
    audio-zeroshot-template audio-zeroshot-workers audio-zeroshot-multiprocessing-context audio-multiprocessing-context
    image-key max-image-pixels text-key json-text-key json-text-key-probs opt-kwargs opt-fallback-list text-layer-decay
    image-layer-decay audio-layer-decay wd-exclude text-pooler-own-group val-retrieval-chunk-size
    val-retrieval-precision torchcompile-strategy torchcompile-backend torchcompile-mode fsdp
    fsdp-no-reshard-after-forward fsdp-offload-cpu fsdp-checkpoint log-metric-every-n-steps train-loss-ema-samples
    use-naflex force-naflex-vision naflex-num-train-image-tokens naflex-patch-sizes naflex-patch-size-probs
    naflex-seq-lens naflex-seq-len-probs naflex-max-tokens-per-batch naflex-max-text-tokens naflex-batch-divisor
    naflex-loss-scale length-bucketing bucket-pool bucket-chunk bucket-prefetch-pools naflex-pad-multiple
    text-pad-multiple
"""
GONE_IN_4 = {"--torchscript", "--trace", "--horovod"}


def open_clips_flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options of open_clip's training command."""
    params = pytest.importorskip("open_clip_train.params")
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parsers.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(InterruptedError):
        params.parse_args([])
    return [option for action in parsers[0]._actions for option in action.option_strings if option.startswith("--")]


def test_the_page_for_those_who_come_from_open_clip_has_every_flag_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of lit-clip that it names are parsed by tests/test_readme.py."""
    rows = re.findall(r"^\| (`--[^|]*) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    flags = [flag for row, _ in rows for flag in re.findall(r"`(--[\w-]+)`", row)]
    known = {f"--{flag}" for flag in NEW_IN_4.split()} | GONE_IN_4 | set(open_clips_flags(monkeypatch))
    assert sorted(flags) == sorted(known - {"--help", "--visual-layer-decay"})  # another name of --image-layer-decay
