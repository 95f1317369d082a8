"""The throughput callback: training time, tokens without padding, and the arithmetic that the model requires."""

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

from callbacks import Throughput, TrainingMonitor, ZeroShot
from callbacks.compile import compile_blocks
from callbacks.throughput import FETCH, Count, TrainingClock, device_peak, peak_memory, throughput
from datamodules import Captions
from lit_clip.batch import CaptionBatch
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TextTransformerConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.models.flops import PairFlops, measure, training_flops
from lit_clip.models.lora import LoRA
from lit_clip.models.transformer import VisionTransformer
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import Evaluation
from lit_clip.training.activation_checkpointing import checkpoint_encoders
from lit_clip.training.plan import tower_work
from lit_clip.training.schedules import WarmupCosine
from lit_clip.weights.load import create_model
from tests.helpers.small_sets import write_table
from tests.test_module import data_for, trainer

PEAK = 1e9
SLEEP = 0.05


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU, which Lightning's table lacks."""
    monkeypatch.setattr("callbacks.throughput.device_peak", lambda trainer: PEAK)


def fit(module: LitCLIP, data: Captions, folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings = {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    ckpt_path = settings.pop("ckpt_path", None)
    fitting = trainer(folder, logger=CSVLogger(folder), callbacks=list(callbacks), **settings)
    fitting.fit(module, data, ckpt_path=ckpt_path)
    return fitting


def logged(folder: Path, name: str) -> list[float]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def learning(config: CLIPConfig) -> LitCLIP:
    """Return a module whose first step changes it."""
    return LitCLIP(config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))


# The clock


def test_the_clock_leaves_out_pauses_and_measures_waiting() -> None:
    times: Iterator[float] = iter([10, 12, 15, 16, 17, 18, 19, 19, 20, 26, 27, 31, 31, 34])
    clock = TrainingClock(lambda: float(next(times)))  # starts at 10, waiting
    clock.end(FETCH)  # 12: 2 s
    clock.begin("validation")  # 15
    clock.begin("checkpoint")  # already paused
    clock.end("validation")  # 17: not yet
    clock.begin(FETCH)  # 18: still paused
    clock.end(FETCH)
    clock.end("checkpoint")  # 19
    clock.begin(FETCH)  # 20
    clock.end(FETCH)  # 26: 6 s
    assert clock.lap() == (5 + 7 + 1, 2 + 6)  # 27
    clock.begin(FETCH)  # 31
    assert clock.lap() == (4, 0)
    assert clock.lap() == (3, 3)  # 34: waiting continues over a lap


# The arithmetic


def test_training_an_encoder_costs_three_times_its_forward_pass(tiny_config: CLIPConfig) -> None:
    config = replace(tiny_config, text=TextTransformerConfig(context_length=24, width=64, layers=3, heads=2))
    size, flops = measure(config), training_flops(CLIP(config))
    assert flops is not None
    assert flops.total(0, 24, 24**2) + flops.text[0] == pytest.approx(3 * (size.text_flops or 0))
    assert size.image_flops is not None
    patches = 2 * 4 * (3 * 16 * 16) * 64  # the patch embedding: pixels need no gradients
    assert flops.image == pytest.approx(3 * size.image_flops - patches)


def test_a_texts_arithmetic_depends_on_its_length(tiny_config: CLIPConfig) -> None:
    """By hand: per token and layer 24 W^2 for the weights and 4 n W for attention; the end is projected."""
    config = replace(tiny_config, text=TextTransformerConfig(context_length=77, width=64, layers=20, heads=2))
    flops = training_flops(CLIP(config))
    assert flops is not None
    for length in (1, 7, 40, 77):
        by_hand = 3 * (20 * length * (24 * 64**2 + 4 * length * 64) + 2 * 64 * 16)
        text = flops.total(1, length, length**2) - flops.image
        assert 0.95 <= text / by_hand <= 1 + 1e-6  # the last of 20 layers computes only the end


def test_frozen_parts_have_no_backward_pass(tiny_config: CLIPConfig) -> None:
    whole = training_flops(LitCLIP(tiny_config).model)
    module = LitCLIP(tiny_config, freeze=Freeze(image="all"))
    frozen, size = training_flops(module.model), measure(tiny_config)
    assert whole is not None
    assert frozen is not None
    assert frozen.image == size.image_flops
    assert frozen.text == whole.text
    module.model.visual.get_parameter("proj").requires_grad_(True)
    projected = training_flops(module.model)
    assert projected is not None
    assert projected.image == (size.image_flops or 0) + 2 * 64 * 16  # the gradient of the projection's weights


def test_recomputation_is_not_counted_and_counting_leaves_the_module_unchanged(tiny_config: CLIPConfig) -> None:
    module = LitCLIP(tiny_config, micro_batch_size=2)
    checkpoint_encoders(module.model)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert training_flops(module.model) == training_flops(LitCLIP(tiny_config).model)
    assert all(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_counting_leaves_the_parameters_of_a_lora_as_they_are(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    """An EMA that was created after counting found fewer parameters than it has to average."""
    base = tmp_path / "base.ckpt"
    torch.manual_seed(0)
    saving = trainer(tmp_path, max_steps=1)
    first = LitCLIP(tiny_config)
    saving.fit(first, data_for(first, write_table(tmp_path), batch_size=4))
    saving.save_checkpoint(base)
    model = LitCLIP(tiny_config, str(base), lora=LoRA(r=2)).model
    before = list(model.named_parameters()), list(model.named_buffers())
    assert training_flops(model)
    assert tower_work(model)
    for now, was in zip((model.named_parameters(), model.named_buffers()), before, strict=True):
        assert [(name, id(tensor)) for name, tensor in now] == [(name, id(tensor)) for name, tensor in was]


def test_padding_of_a_compiled_model_is_not_counted(tiny_config: CLIPConfig) -> None:
    config = replace(tiny_config, text=TextTransformerConfig(context_length=77, width=64, layers=2, heads=2))
    model = CLIP(config)
    plain = training_flops(model)
    compile_blocks(model, backend="eager")
    assert training_flops(model) == plain
    assert model.transformer.is_compiled


def test_an_encoder_that_is_not_causal_costs_the_whole_context(tiny_config: CLIPConfig) -> None:
    text = TextTransformerConfig(context_length=16, width=64, layers=1, heads=1, causal=False)
    config = replace(tiny_config, text=text)
    flops = training_flops(CLIP(config))
    assert flops is not None
    assert flops.text == (3 * (measure(config).text_flops or 0), 0, 0)


@pytest.mark.parametrize("family", ["bert", "roberta"])  # roberta's padding has id 1
def test_an_encoder_that_depends_on_its_inputs_is_counted_too(
    family: str, folders: dict[str, Path], tiny_config: CLIPConfig
) -> None:
    text = HuggingFaceTextConfig(str(folders[family]), context_length=32)
    model = create_model(replace(tiny_config, text=text))
    flops = training_flops(model)
    assert flops is not None
    # Two layers, W = 32, an MLP of width 48; a linear projection to 16.
    by_hand = (3 * 2 * 32 * 16, 3 * 2 * (8 * 32**2 + 4 * 32 * 48), 3 * 2 * 4 * 32)
    assert flops.text == pytest.approx(by_hand)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_count_there_is_no_mfu_and_a_warning(
    tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: VisionTransformer, images: Tensor) -> Tensor:
        if len(images) == 1:
            raise ValueError("cannot count")
        return VisionTransformer.project(self, VisionTransformer.features(self, images))

    table, module = write_table(tmp_path), learning(tiny_config)
    monkeypatch.setattr(VisionTransformer, "forward", fails)
    with pytest.warns(UserWarning, match="there is no train/mfu"):
        done = fit(module, data_for(module, table, batch_size=4), tmp_path, Throughput())
    assert "train/mfu" not in done.callback_metrics
    assert "train/tokens_per_second" in done.callback_metrics


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.5e12),  # NVIDIA's data sheet: 1,979 with sparsity, half without
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("an unknown GPU", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "transformer-engine", None),
    ],
)
@pytest.mark.filterwarnings("ignore:FLOPs not found")
def test_a_gpus_peak_is_that_of_its_data_sheet(
    gpu: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    fake: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), precision=precision)
    assert device_peak(fake) == (None if peak is None else pytest.approx(peak, rel=1e-3))


# The metrics


def test_metrics_are_sums_over_ranks_and_the_worst_wait_and_memory() -> None:
    counts = [Count(10, 8, 0, (50, 400), (2.0, 0.5), 2**30), Count(10, 10, 0, (70, 600), (2.1, 1.05), 2**31)]
    metrics = throughput(counts, 16, PairFlops(100.0, (10.0, 2.0, 1.0)), 1000.0)
    assert metrics == {
        "train/samples_per_second": 10.0,
        "train/data_wait_share": 0.5,
        "train/tokens_per_second": 60.0,
        "train/padded_tokens_per_second": 18 * 16 / 2,
        "train/peak_memory_gib": 2.0,
        "train/mfu": (110 * 18 + 2 * 120 + 1000) / (2 * 1000.0 * 2),
    }
    assert "train/mfu" not in throughput(counts, 16, None, 1000.0)
    assert "train/mfu" not in throughput(counts, 16, PairFlops(1, (1, 1, 1)), None)


def lengths_of(table: Path, module: LitCLIP) -> list[int]:
    with table.open(encoding="utf-8") as file:
        counts = [module.tokenize.count(row["caption"]) for row in csv.DictReader(file)]
    return [min(count, module.model.context_length) for count in counts]


def test_tokens_and_arithmetic_are_those_of_the_captions(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    table = write_table(tmp_path)
    module = learning(tiny_config)
    fit(module, data_for(module, table, batch_size=4), tmp_path, Throughput(), max_epochs=2, log_every_n_steps=2)
    lengths = lengths_of(table, module)
    samples, tokens, padded, mfu = (
        logged(tmp_path, f"train/{name}")
        for name in ("samples_per_second", "tokens_per_second", "padded_tokens_per_second", "mfu")
    )
    assert len(samples) == 2  # steps 2 and 4
    flops = training_flops(module.model)
    assert flops is not None
    flops_of_epoch = flops.total(8, sum(lengths), sum(length**2 for length in lengths))
    for rate, padded_rate, token_rate, utilisation in zip(samples, padded, tokens, mfu, strict=True):
        assert token_rate / rate == pytest.approx(sum(lengths) / 8)
        assert padded_rate / rate == pytest.approx(16)
        assert utilisation / rate == pytest.approx(flops_of_epoch / 8 / PEAK)


def test_known_lengths_need_no_synchronisation_with_the_device(tiny_config: CLIPConfig) -> None:
    class Batch(CaptionBatch):
        lengths = (3, 5)

    callback, model = Throughput(), LitCLIP(tiny_config).model
    callback._add(Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, device="meta"), ["a", "b"]), model)
    assert callback._count.texts is not None
    assert callback._count.texts.tolist() == [8, 34]


def test_skipped_samples_count_as_samples_without_tokens_and_arithmetic(tiny_config: CLIPConfig) -> None:
    callback, model = Throughput(), LitCLIP(tiny_config).model
    skipped = [("row 3", "broken"), ("row 4", "broken")]
    tokens = model.tokenize(["a cat", "two cats"])
    callback._add(CaptionBatch(torch.zeros(2, 3, 32, 32), tokens, ["a", "b"], skipped=skipped), model)
    callback._add(CaptionBatch(torch.zeros(0, 3, 32, 32), tokens[:0], [], skipped=skipped * 2), model)
    assert (callback._count.samples, callback._count.pairs) == (8, 2)
    assert callback._count.texts is not None
    assert callback._count.texts.tolist() == [8, 32]  # each: start, two words, end


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**25)  # 128 MiB, written to
    after = peak_memory(torch.device("cpu"))
    assert after >= held.numel() * 4
    del held
    assert peak_memory(torch.device("cpu")) >= 0.99 * max(before, after)  # Linux's count is approximate


# In a run


class SlowData(Captions):
    """Data whose every batch takes ``SLEEP`` seconds."""

    def train_dataloader(self) -> Any:
        return Slow(super().train_dataloader())


class Slow:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            time.sleep(SLEEP)
            yield batch


def slow_data(table: Path) -> SlowData:
    return SlowData(str(table), str(table), batch_size=4, num_workers=0)


class Steps(Callback):
    """Sleep in each step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(SLEEP)


def test_waiting_for_data_is_measured_in_the_loop(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    table, module, steps = write_table(tmp_path), learning(tiny_config), Steps()
    fit(module, slow_data(table), tmp_path, steps, Throughput(), max_epochs=2)
    for rate, share in zip(
        logged(tmp_path, "train/samples_per_second"), logged(tmp_path, "train/data_wait_share"), strict=True
    ):
        assert SLEEP <= share * 4 / rate <= 4 / rate - SLEEP  # seconds of a step


class Sleeps(Callback):
    """Sleep before the first step, in each validation, in each checkpoint, or between epochs."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(0.6 * (self.where == "start"))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(0.2 * (self.where == "validations"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        time.sleep(0.2 * (self.where == "checkpoints"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(0.6 * (self.where == "ends of epochs"))


class SleepyZeroShot(ZeroShot):
    """An evaluation that sleeps between two steps."""

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> Evaluation:
        time.sleep(0.2)
        return Evaluation({"zero_shot/none/top1": 0.0})


class OnlySleeps:
    """A ``time`` that nothing but sleeping moves."""

    seconds = 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def perf_counter(self) -> float:
        return self.seconds


@pytest.mark.parametrize("where", ["start", "validations", "checkpoints", "ends of epochs", "evaluations"])
def test_time_outside_training_is_not_counted(
    where: str, tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four steps sleeps, and something else does before the last of them."""
    table, module = write_table(tmp_path), learning(tiny_config)
    monkeypatch.setattr(f"{__name__}.time", OnlySleeps())
    counting = Throughput()
    counting.now = time.perf_counter
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    sleeps = SleepyZeroShot(every_n_steps=1) if where == "evaluations" else Sleeps(where)
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1, "val_check_interval": 1}
    fit(module, data_for(module, table, batch_size=4), tmp_path, Steps(), counting, sleeps, saving, **options)
    assert time.perf_counter() >= 4 * SLEEP + 0.6
    assert [4 / rate for rate in logged(tmp_path, "train/samples_per_second")] == pytest.approx([SLEEP] * 4)
    assert logged(tmp_path, "train/data_wait_share") == pytest.approx([0] * 4)


def test_the_rest_of_an_interval_with_which_a_run_is_resumed_has_no_rate(
    tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    """One step with the start of everything would look like a slow run."""
    table = write_table(tmp_path)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    for path, rates in ((None, 2), (tmp_path / "step=1.ckpt", 1)):
        module, folder = LitCLIP(tiny_config), tmp_path / str(rates)
        options = {"max_epochs": 2, "log_every_n_steps": 2, "ckpt_path": path}
        fit(module, data_for(module, table, batch_size=4), folder, Throughput(), saving, **options)
        assert len(logged(folder, "train/samples_per_second")) == rates  # of steps 2 and 4


class Fails(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("others", [[], [Fails()]], ids=["a run", "a failed run"])
def test_the_users_profiler_works_as_usual_and_is_restored(
    others: list[Callback], tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    table, profiler, module = write_table(tmp_path), SimpleProfiler(), learning(tiny_config)
    with pytest.raises(RuntimeError, match="on purpose") if others else nullcontext():
        fit(module, data_for(module, table, batch_size=4), tmp_path, Throughput(), *others, profiler=profiler)
    assert len(profiler.recorded_durations[FETCH]) == 2
    assert {"start", "stop"}.isdisjoint(vars(profiler))


def test_arithmetic_is_counted_once_and_draws_no_random_numbers_of_the_run(
    tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, module, counts = write_table(tmp_path), LitCLIP(tiny_config), list[CLIP]()

    def counted(model: CLIP) -> PairFlops | None:
        counts.append(model)
        torch.rand(1)  # as an encoder with random patches may
        return training_flops(model)

    monkeypatch.setattr("callbacks.throughput.training_flops", counted)
    states = []
    for callbacks in ([], [Throughput()]):
        torch.manual_seed(0)
        fit(module, data_for(module, table, batch_size=2), tmp_path, *callbacks, max_epochs=2, log_every_n_steps=2)
        states.append(torch.get_rng_state())
    assert counts == [module.model]
    assert module.trainer.global_step >= 4
    assert torch.equal(*states)


def test_validate_logs_no_training_metrics(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    table, module = write_table(tmp_path), LitCLIP(tiny_config)
    validating = trainer(tmp_path, callbacks=[Throughput(), TrainingMonitor()])
    validating.validate(module, data_for(module, table, batch_size=4), verbose=False)
    assert not [name for name in validating.callback_metrics if name.startswith("train/")]


def test_two_ranks_count_the_work_of_both(ranks: Callable[..., Any], tiny_config: CLIPConfig, tmp_path: Path) -> None:
    table, module = write_table(tmp_path), LitCLIP(tiny_config)
    metrics = ranks("throughput", 2, table, script="ranks_callbacks.py")
    rate = metrics["train/samples_per_second"]
    assert metrics["train/tokens_per_second"] / rate == pytest.approx(sum(lengths_of(table, module)) / 8)
    assert metrics["train/padded_tokens_per_second"] / rate == pytest.approx(16)
    assert 0 <= metrics["train/data_wait_share"] <= 1
    assert metrics["train/mfu"] > 0
