"""Steps that are not finite: all ranks undo them alike, and their pairs are listed."""

import csv
import json
import os
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

import callbacks
from callbacks import NonFiniteSteps
from callbacks.non_finite import MOST_IN_A_ROW
from datamodules import Captions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses.contrastive import contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig
from lit_clip.module import LitCLIP
from lit_clip.tools import hardware
from lit_clip.training.optimizers import PaperAdamW, decay_groups, obeys_found_inf
from lit_clip.training.schedules import WarmupCosine, warmup_cosine
from tests.callbacks.test_preemption import SignalAt
from tests.conftest import without_packaged_defaults
from tests.helpers import forks
from tests.helpers.ranks_stability import BrokenGradient, BrokenImage
from tests.models.test_finetune import command
from tests.test_module import data_for, trainer

Cli = Callable[..., subprocess.CompletedProcess[str]]
WITH_BATCH_NORM = CLIPConfig(
    embed_dim=16,
    image=ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32),
    text=TextTransformerConfig(context_length=16, width=16, layers=1, heads=1),
)


def batches(table: Path, config: CLIPConfig, epochs: int = 1) -> Iterator[tuple[int, CaptionBatch]]:
    """Yield each epoch's 4 global batches of 16 pairs, with the epoch."""
    model = CLIP(config)
    data = Captions(str(table), str(table), batch_size=16, num_workers=0)
    data.preprocessing, data.tokenize = model.preprocessing, model.tokenizer
    data.setup("fit")
    loader: Any = data.train_dataloader()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            yield epoch, batch


_first_epochs: dict[tuple[Path, str], list[CaptionBatch]] = {}


def first_epoch(table: Path, config: CLIPConfig) -> list[CaptionBatch]:
    """Return its batches, which are read once."""
    key = table, str(config)
    if key not in _first_epochs:
        _first_epochs[key] = [batch for _, batch in batches(table, config)]
    return _first_epochs[key]


def key_of_step(table: Path, config: CLIPConfig, step: int) -> str:
    """Return the key of a pair in a given step of the first epoch."""
    return first_epoch(table, config)[step].keys[5]


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> Fit:
    """Fit a tiny model, which learns from the first step on, for an epoch of 4 steps."""

    def run(*used: Callback, module: LitCLIP | None = None, ckpt_path: Path | None = None, **options: Any) -> Trainer:
        module = module or LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
        data = data_for(module, caption_table, batch_size=options.pop("batch_size", 16))
        settings = {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [*used], **options}
        fitting = trainer(tmp_path, **settings)
        fitting.fit(module, data, ckpt_path=ckpt_path)
        return fitting

    return run


Broken = Callable[[int], BrokenImage]


@pytest.fixture
def broken(tiny_config: CLIPConfig, caption_table: Path) -> Broken:
    """Break an image of the given step of the first epoch."""
    return lambda step: BrokenImage([key_of_step(caption_table, tiny_config, step)])


def findings(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("non_finite.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_without(
    key: str,
    skipped: list[int],
    state: dict[str, Tensor],
    table: Path,
    config: CLIPConfig,
    epochs: int,
    steps: int = 99,
) -> tuple[dict[str, Tensor], list[int]]:
    """Train in a plain loop without the steps that contain a pair, or are listed in ``skipped``.

    Returns:
        The weights, and the steps left out.
    """
    model = CLIP(config)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.2), lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    left_out = []
    for step, (_, batch) in enumerate(batches(table, config, epochs)):
        if step == steps:
            break
        if key in batch.keys or step in skipped:
            left_out.append(step)
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * warmup_cosine(step, 1, 4 * epochs)
        image = model.encode_image(model.normalize(batch.images), normalize=True)
        text = model.encode_text(batch.tokens, normalize=True)
        optimizer.zero_grad()
        contrastive_loss(image, text, image, text, model.logit_scale.exp()).backward()
        optimizer.step()
        model.clamp_logit_scale()
    return model.state_dict(), left_out


def assert_same_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        if key.endswith("in_proj_bias"):  # the gradient of the keys' bias is zero; Adam amplifies its rounding errors
            continue
        torch.testing.assert_close(ours[key], value, atol=5e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        assert ((ours[key] - value).abs() > 1e-4).float().mean() < 1e-3, key  # Adam amplifies tiny gradients


SKIP = "--trainer.callbacks+={class_path: callbacks.NonFiniteSteps, init_args: {policy: skip}}"


def callback(name: str, **arguments: Any) -> str:
    values = {"class_path": f"tests.helpers.ranks_stability.{name}", "init_args": arguments}
    return "--trainer.callbacks+=" + json.dumps(values)


@pytest.mark.parametrize(
    "later", [pytest.param(False, id="read at once", marks=pytest.mark.slow), pytest.param(True, id="read later")]
)
def test_two_ranks_skip_the_steps_that_are_not_finite_on_one(
    later: bool, cli: Cli, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    key = key_of_step(caption_table, tiny_config, 1)
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    options += ["--trainer.log_every_n_steps", "8" if later else "1", *[callback("RunsAhead")] * later]
    options += ["--data.batch_size", "8", "--trainer.max_epochs", "2", SKIP]
    options += [callback("BrokenImage", keys=[key], folder="."), callback("BrokenGradient", step=3, rank=1)]
    result = cli(*command(caption_table, *options))
    assert result.returncode == 0, result.stderr
    first, rank_0, rank_1 = (torch.load(tmp_path / f"{name}.pt") for name in ("first_0", "last_0", "last_1"))
    for name, value in rank_0.items():
        assert torch.equal(value, rank_1[name]), name
    expected, steps = trained_without(key, [3], first, caption_table, tiny_config, epochs=2)
    assert steps[:2] == [1, 3]
    assert len(steps) == 3
    assert_same_weights(rank_0, expected)
    assert not torch.allclose(rank_0["visual.proj"], first["visual.proj"], atol=1e-3)

    found = findings(tmp_path)
    images = [line for line in found if line["reason"] == "loss"]
    assert [(line["step"], line["keys"]) for line in images] == [(steps[0], [key]), (steps[2], [key])]
    assert all(line["rank"] in (0, 1) and line["non_finite_features"] for line in images)
    gradients = [line for line in found if line["reason"] == "gradient"]
    assert [(line["step"], line["rank"], line["non_finite_features"]) for line in gradients] == [
        (3, 0, False),
        (3, 1, False),
    ]
    batch = first_epoch(caption_table, tiny_config)[3]
    assert sorted(key for line in gradients for key in line["keys"]) == sorted(batch.keys)
    assert result.stderr.count("step 1 is skipped: the loss is nan") == 1
    assert result.stderr.count("step 3 is skipped: a gradient is not finite") == 1
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        counts = [float(row["train/non_finite_steps"]) for row in csv.DictReader(file) if row["train/non_finite_steps"]]
    every = [sum(step <= now for step in steps) for now in range(8)]
    assert counts == (every[-1:] if later else every)
    (saved,) = tmp_path.rglob("*.ckpt")
    assert torch.load(saved, weights_only=True)["callbacks"]["NonFiniteSteps"] == {"steps": 3}


def test_both_ranks_stop_with_the_same_message_and_the_weights_before_the_step(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    key = key_of_step(caption_table, tiny_config, 2)
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    options += ["--trainer.max_epochs", "1", callback("BrokenImage", keys=[key], folder=".")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    words = ["lit-clip", *without_packaged_defaults(command(caption_table, *options))]
    environments = [{**os.environ, **cluster, "LOCAL_RANK": rank} for rank in ("0", "1")]
    ranks = forks.run([forks.Program(forks.command, words, tmp_path, each) for each in environments], 120)
    errors = [rank.stderr for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    first, second = ([line for line in text.splitlines() if line.startswith("lit-clip: error")] for text in errors)
    assert first == second
    assert len(first) == 1
    assert "training stopped at step 2: the loss is nan" in first[0]
    assert key in first[0]
    assert "callbacks.NonFiniteSteps with policy: skip" in first[0]
    (found,) = findings(tmp_path)
    assert (found["step"], found["keys"], found["reason"]) == (2, [key], "loss")
    before, *last = (torch.load(tmp_path / f"{name}.pt") for name in ("first_0", "last_0", "last_1"))
    expected, _ = trained_without(key, [], before, caption_table, tiny_config, epochs=1, steps=2)
    for state in last:
        assert_same_weights(state, expected)


class States(Callback):
    """Record weights, buffers and optimiser moments before each step and at the end."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        for i, moments in enumerate(trainer.optimizers[0].state.values()):
            state |= {f"{name} {i}": value.clone() for name, value in moments.items()}
        self.seen.append(state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module)


def scaled() -> MixedPrecision:
    """Return ``16-mixed`` as on a GPU; on a CPU Lightning replaces the name by ``bf16-mixed``."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.fixture(params=[False, True], ids=["read at once", "read later"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Train as on a CPU, and as on a GPU, where the result of a step is read one step later."""
    monkeypatch.setattr(hardware, "runs_ahead", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fused"),
        pytest.param({"gradient_clip_val": 1.0}, id="clipped by norm"),
        pytest.param(
            {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
            id="clipped by value",
            marks=pytest.mark.slow,
        ),
        pytest.param({"gradient_clip_val": 1.0, "precision": "bf16-mixed"}, id="bf16-mixed", marks=pytest.mark.slow),
        pytest.param({"precision": "16-mixed"}, id="16-mixed with a gradient scaler"),
    ],
)
@pytest.mark.usefixtures("ahead")
def test_a_skipped_step_changes_nothing(options: dict[str, Any], caption_table: Path, fit: Fit) -> None:
    """Neither weights nor BatchNorm statistics nor AdamW's moments and step count."""
    if options.get("precision") == "16-mixed":
        options = {"plugins": [scaled()]}
    module = LitCLIP(
        WITH_BATCH_NORM, optimizer=partial(PaperAdamW, lr=1e-3), lr_scheduler=partial(WarmupCosine, warmup_steps=0)
    )
    states, broken = States(), BrokenImage([key_of_step(caption_table, WITH_BATCH_NORM, 2)])
    with pytest.warns(UserWarning, match="step 2 is skipped: the loss is nan"):
        fitting = fit(states, broken, NonFiniteSteps("skip"), module=module, **options)
    assert changed(*states.seen[2:4]) == set()
    moved = changed(*states.seen[3:5])
    assert {"model.visual.attnpool.c_proj.weight", "model.visual.bn1.running_mean", "exp_avg 0", "step 0"} <= moved
    assert all(value.isfinite().all() for value in states.seen[4].values())
    assert fitting.global_step == 4


@pytest.mark.parametrize("logged", [pytest.param(1, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize(("policy", "weights_alone"), [("stop", False), ("skip", False), ("stop", True)])
@pytest.mark.usefixtures("ahead")
def test_no_checkpoint_is_written_of_a_step_that_stops_a_run(
    policy: Any, weights_alone: bool, logged: int, fit: Fit, broken: Broken, tmp_path: Path
) -> None:
    """A file of weights alone has no callback's state, whose saving reads the step before."""
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_alone)
    stops = pytest.raises(InputError, match="training stopped at step 2: the loss is nan")
    with stops if policy == "stop" else nullcontext():
        fit(every, broken(2), NonFiniteSteps(policy), log_every_n_steps=logged)
    saved = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    assert saved.keys() == {f"step={step}" for step in ((1, 2) if policy == "stop" else (1, 2, 3, 4))}
    if not weights_alone:
        counts = [saved[name]["callbacks"]["NonFiniteSteps"]["steps"] for name in sorted(saved)]
        assert counts == ([0, 0] if policy == "stop" else [0, 0, 1, 1])


def test_a_run_that_stops_late_has_the_weights_before_the_step(
    ahead: bool, tiny_config: CLIPConfig, fit: Fit, broken: Broken
) -> None:
    module, states = LitCLIP(tiny_config), States()
    with pytest.raises(InputError, match="training stopped at step 1: the loss is nan"):
        fit(states, broken(1), NonFiniteSteps(), module=module)
    assert len(states.seen) == 2 + ahead  # began as many steps
    assert module.trainer.global_step == 1 + ahead
    for name, value in module.state_dict().items():
        assert torch.equal(value, states.seen[1][name]), name


class Told(Callback):
    """Record the exceptions that callbacks are told of."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.errors.append(exception)


@pytest.mark.parametrize("validated", [False, True])
def test_a_signal_with_a_step_that_stops_a_run_ends_it_with_the_steps_error_and_saves_nothing(
    validated: bool, ahead: bool, fit: Fit, broken: Broken, tmp_path: Path
) -> None:
    told, last = Told(), ModelCheckpoint(tmp_path, every_n_epochs=100, save_last=True)
    used = callbacks.defaults(last, SignalAt("on_before_optimizer_step", 3), broken(2), told)
    options = {"limit_val_batches": 1.0, "val_check_interval": 3 if validated else 4, "num_sanity_val_steps": 0}
    with pytest.raises(InputError, match="training stopped at step 2: the loss is nan") as error:
        fit(*used, log_every_n_steps=50, **options)
    read_late = "; SIGTERM saved nothing, so resume from an earlier checkpoint"
    assert str(error.value).endswith(read_late) == ahead  # otherwise the step ended the run before the signal was seen
    assert told.errors == [error.value]
    assert not list(tmp_path.glob("*.ckpt"))


def test_only_torchs_fused_adam_is_told_on_the_device_to_do_nothing() -> None:
    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    def made(kind: Any, **settings: Any) -> torch.optim.Optimizer:
        return kind([{"params": [torch.nn.Parameter(torch.ones(3))], **settings}], lr=0.1)

    assert obeys_found_inf(made(PaperAdamW, fused=True), torch.device("cpu"))
    assert obeys_found_inf(made(torch.optim.Adam, fused=True), torch.device("cpu"))
    offloaded = made(PaperAdamW, fused=True)  # its kernel would not wait for a scalar of the GPU
    assert not obeys_found_inf(offloaded, torch.device("cuda"))
    assert not any(
        obeys_found_inf(optimizer, torch.device("cpu"))
        for optimizer in (made(PaperAdamW), made(Own, fused=True), made(torch.optim.SGD, fused=True))
    )


def test_overflowing_gradients_are_left_to_the_gradient_scaler(fit: Fit) -> None:
    states, precision, non_finite = States(), scaled(), NonFiniteSteps()
    fit(states, BrokenGradient(1), non_finite, plugins=[precision])
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 2.0**9  # halved once: it skipped that step itself
    assert changed(*states.seen[1:3]) == set()
    assert changed(*states.seen[2:4])
    assert non_finite.steps == 0


def test_a_resumed_run_continues_the_count(fit: Fit, broken: Broken, tmp_path: Path) -> None:
    counts = []
    for epochs, path in ((1, None), (2, tmp_path / "last.ckpt")):
        saver = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        with pytest.warns(UserWarning, match=f"{epochs} such steps so far"):
            fitting = fit(saver, broken(1), NonFiniteSteps("skip"), ckpt_path=path, max_epochs=epochs)
        counts.append(float(fitting.callback_metrics["train/non_finite_steps"]))
    assert counts == [1, 2]


def test_too_many_non_finite_steps_in_a_row_stop_even_a_run_that_skips(
    tiny_config: CLIPConfig, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_IN_A_ROW == 100
    monkeypatch.setattr("callbacks.non_finite.MOST_IN_A_ROW", 20)
    module = LitCLIP(tiny_config)
    with torch.no_grad():
        module.model.visual.proj.fill_(torch.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="so were 20 steps in a row: resume from a checkpoint before them"):
            fit(NonFiniteSteps("skip"), module=module, batch_size=4, max_epochs=99)
    assert module.trainer.global_step == 19
    messages = [str(warning.message) for warning in caught if "is skipped" in str(warning.message)]
    assert [line.split()[1] for line in messages] == ["0", "1", "3", "7", "15"]  # the 1st, 2nd, 4th, ...


def test_without_a_logger_only_the_message_names_the_first_pairs(
    tiny_config: CLIPConfig, caption_table: Path, fit: Fit, tmp_path: Path
) -> None:
    batch = first_epoch(caption_table, tiny_config)[0]
    with pytest.raises(InputError) as caught:
        fit(BrokenImage(None), NonFiniteSteps())
    assert f"(pairs with such features: {', '.join(batch.keys[:3])} and 13 more)" in str(caught.value)
    assert not list(tmp_path.rglob("non_finite.jsonl"))


def test_an_unwritable_list_of_steps_does_not_stop_the_run(fit: Fit, broken: Broken, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    (Path(logger.log_dir) / "non_finite.jsonl").mkdir(parents=True)
    with pytest.warns(UserWarning, match="the keys of step 1 are lost"):
        assert fit(broken(1), NonFiniteSteps("skip"), logger=logger).global_step == 4


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_training_weights_in_half_precision_is_refused(precision: str, fit: Fit) -> None:
    with pytest.raises(InputError, match=rf"trainer.precision: {precision} trains weights .*use bf16-mixed"):
        fit(precision=precision)


def test_an_unknown_policy_is_refused() -> None:
    policy: Any = "ignore"
    with pytest.raises(InputError, match=r"NonFiniteSteps.policy: 'ignore' must be 'stop' or 'skip'"):
        NonFiniteSteps(policy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_is_skipped_on_a_cuda_device_in_every_precision(precision: str, caption_table: Path, fit: Fit) -> None:
    module = LitCLIP(
        WITH_BATCH_NORM, optimizer=partial(PaperAdamW, lr=1e-3), lr_scheduler=partial(WarmupCosine, warmup_steps=0)
    )
    states, broken = States(), BrokenImage([key_of_step(caption_table, WITH_BATCH_NORM, 2)])
    skipped = NonFiniteSteps("skip")
    fit(states, broken, skipped, module=module, accelerator="gpu", devices=1, precision=precision)
    assert changed(*states.seen[2:4]) == set()
    assert changed(*states.seen[3:5])
    assert skipped.steps == 1
