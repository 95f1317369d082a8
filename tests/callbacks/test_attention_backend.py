"""The attention backend of a run: measured on the model's own calls, set for the run, and the same on all ranks."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.attention import SDPBackend

import callbacks
from callbacks import AttentionBackend, Compile, attention_backend
from callbacks.attention_backend import AttentionCall, Measured, best_order, recorded
from callbacks.compile import compile_blocks
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.module import LitCLIP
from tests.callbacks.test_non_finite import WITH_BATCH_NORM
from tests.helpers.small_sets import write_table
from tests.test_module import data_for, trainer

CONFIG = CLIPConfig(
    16,
    VisionTransformerConfig(image_size=32, patch_size=16, width=32, layers=3, heads=2),
    TextTransformerConfig(context_length=16, vocab_size=49408, width=32, layers=2, heads=1),
)
KERNELS = {
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_attention_math",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "SECONDS", 1e-3)


class Kernels(Callback):
    """Record which attention kernels the training steps and validations run, and the tag of compiled graphs."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {"train": set(), "validation": set()}
        self.tag = ""

    def _start(self, *_: Any, **__: Any) -> None:
        self.profile = torch.profiler.profile(acc_events=True)
        self.profile.__enter__()

    def _stop(self, stage: str) -> None:
        self.profile.__exit__(None, None, None)
        names = {event.key for event in self.profile.key_averages()}
        self.found[stage] |= {name for name, kernel in KERNELS.items() if kernel in names}

    on_train_batch_start = on_validation_start = _start

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._stop("train")
        self.tag = torch.compiler.config.cache_key_tag

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._stop("validation")


def fit(folder: Path, table: Path, *used: Callback, config: CLIPConfig = CONFIG, **options: Any) -> LitCLIP:
    torch.manual_seed(0)
    module = LitCLIP(config)
    settings = {"max_steps": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False, **options}
    trainer(folder, callbacks=callbacks.defaults(*used), **settings).fit(module, data_for(module, table))
    return module


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_named_backend_computes_all_attention_of_steps_and_validations_and_nothing_after(
    backend: Any, caption_table: Path, tmp_path: Path
) -> None:
    kernels = Kernels()
    fit(tmp_path, caption_table, AttentionBackend(backend), kernels, val_check_interval=1, limit_val_batches=1)
    assert kernels.found == {"train": {backend}, "validation": {backend}}
    assert f"'{backend}'" in kernels.tag
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.compiler.config.cache_key_tag


def test_the_faster_one_is_chosen_and_named_in_one_line(
    caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The times are real ones, of which one backend's are made longer."""
    seconds = AttentionCall._seconds
    for slow, fast in ((SDPBackend.FLASH_ATTENTION, "math"), (SDPBackend.MATH, "flash")):

        def slower(self: AttentionCall, backend: SDPBackend, slow: SDPBackend = slow) -> float | None:
            found = seconds(self, backend)
            return 1000 * found if backend == slow and found is not None else found

        monkeypatch.setattr(AttentionCall, "_seconds", slower)
        caplog.clear()
        kernels = Kernels()
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            fit(tmp_path, caption_table, AttentionBackend(), kernels)
        assert kernels.found["train"] == {fast}
        (line,) = [line for line in caplog.messages if "AttentionBackend" in line]
        assert line.startswith(f"callbacks.AttentionBackend: {fast}")
        assert "milliseconds of a batch's attention, forward and backward: flash " in line


def test_the_calls_of_the_model_are_measured_each_kind_once(caption_table: Path, tmp_path: Path) -> None:
    found: list[AttentionCall] = []

    class Recording(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            pl_module.eval()
            found[:] = recorded(lambda: trainer.strategy.predict_step(batch._replace(lengths=[7] * 16), 0))
            pl_module.train()

    fit(tmp_path, caption_table, Recording(), max_steps=1)
    kinds = [(*(tuple(each.shape) for each in call.inputs[:2]), call.times) for call in found]
    assert kinds == [
        ((16, 2, 5, 16), (16, 2, 5, 16), 2),  # images: the first two blocks
        ((16, 2, 1, 16), (16, 2, 5, 16), 1),  # the last computes the class token alone
        ((16, 1, 7, 32), (16, 1, 7, 32), 1),  # texts of 7 tokens
        ((16, 1, 1, 32), (16, 1, 7, 32), 1),
    ]


def test_masks_and_options_by_name_make_a_call_of_its_own_and_are_measured_too() -> None:
    q, k, v = (torch.randn(2, 1, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, mask)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask.clone(), scale=0.5)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask.clone(), scale=0.5)
        F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)

    calls = recorded(run)
    assert [call.times for call in calls] == [1, 2, 1]
    for call in calls:
        times, seconds = call.measured()
        assert times == call.times
        assert set(seconds) == {"flash", "math"}  # what torch has for a CPU
        assert all(value > 0 for value in seconds.values())
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    assert torch.equal(calls[1].attend(q, k, v), expected)
    assert torch.equal(calls[2].attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("config", [CONFIG, WITH_BATCH_NORM], ids=["transformer", "batch norm"])
def test_measuring_changes_no_weight_statistic_or_random_number(
    config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """With flash, which torch takes on a CPU anyway."""
    options: dict[str, Any] = {"config": config, "max_steps": 3}
    plain = fit(tmp_path, caption_table, **options).state_dict()
    measured = fit(tmp_path, caption_table, AttentionBackend("flash"), **options).state_dict()
    for name, value in plain.items():
        assert torch.equal(measured[name], value), name


def test_a_compiled_model_is_recorded_in_rows_and_compiled_without_a_break(
    caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("callbacks.compile.compile_blocks", lambda model: compile_blocks(model, backend="eager"))
    measured: list[AttentionCall] = []
    seconds = AttentionCall.measured

    def noting(self: AttentionCall) -> Measured:
        measured.append(self)
        return seconds(self)

    monkeypatch.setattr(AttentionCall, "measured", noting)
    kernels = Kernels()
    fit(tmp_path, caption_table, AttentionBackend("math"), Compile(), kernels, limit_val_batches=0)
    rows = [call for call in measured if call.inputs[0].shape[1:] == (1, 16, 32)]
    assert [call.times for call in rows] == [2]  # the queries of the last block too
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "flash" not in kernels.found["train"]


@pytest.mark.slow  # half a minute of compiling
def test_blocks_that_were_compiled_before_get_the_new_backend(
    caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("callbacks.compile.compile_blocks", lambda model: compile_blocks(model, backend="aot_eager"))
    for backend in ("flash", "math"):
        kernels = Kernels()
        fit(tmp_path, caption_table, AttentionBackend(backend), Compile(), kernels, limit_val_batches=0)
        assert ("flash" in kernels.found["train"]) == (backend == "flash")


def test_a_micro_batch_is_measured_where_a_step_has_several(
    caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    monkeypatch.setattr(
        AttentionCall, "measured", lambda self: sizes.add(len(self.inputs[0])) or Measured(1, {"math": 1.0})
    )
    module = LitCLIP(CONFIG, micro_batch_size=4)
    fitting = trainer(tmp_path, callbacks=callbacks.defaults(AttentionBackend()), max_steps=1, limit_val_batches=0)
    fitting.fit(module, data_for(module, caption_table))
    assert max(sizes) == 4


def plain_total(measured: list[Measured], order: tuple[str, ...]) -> float:
    total = 0.0
    for times, seconds in measured:
        for name in order:
            if name in seconds:
                total += times * seconds[name]
                break
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_order_has_the_least_time_of_all_orders(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for _ in range(3):
        seconds = dict(zip(attention_backend.BACKENDS, torch.rand(4, generator=generator).tolist(), strict=True))
        for name in ("flash", "efficient", "cudnn"):  # every call can be computed by math
            if torch.rand((), generator=generator) < 0.4:
                del seconds[name]
        measured.append(Measured(int(torch.randint(1, 13, (), generator=generator)), seconds))
    order = best_order(measured, "fastest", "cuda")
    least = min(plain_total(measured, each) for each in permutations(attention_backend.BACKENDS))
    assert plain_total(measured, tuple(order)) == pytest.approx(least)
    assert order[-1] == "math"
    assert best_order(measured, "math", "cuda") == ["math"]


def test_a_named_backend_is_first_and_the_fastest_others_compute_what_it_cannot() -> None:
    image = Measured(11, {"flash": 2.0, "efficient": 3.0, "cudnn": 1.0, "math": 9.0})
    text = Measured(12, {"efficient": 2.0, "cudnn": 3.0, "math": 9.0})  # with a mask
    assert best_order([image, text], "fastest", "cuda") == ["flash", "efficient", "cudnn", "math"]  # 22 + 24
    assert best_order([image, text], "flash", "cuda") == ["flash", "efficient", "cudnn", "math"]
    assert best_order([image, text], "cudnn", "cuda")[0] == "cudnn"  # 11 + 36
    assert best_order([image, text], "efficient", "cuda")[0] == "efficient"  # 33 + 24


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_a_backend_that_computes_no_call_is_refused_by_name(backend: Any, caption_table: Path, tmp_path: Path) -> None:
    line = rf"AttentionBackend\.backend: {backend} can compute none of the model's attention on this cpu device; "
    with pytest.raises(InputError, match=line + "choose one of fastest, flash, math"):
        fit(tmp_path, caption_table, AttentionBackend(backend))
    assert torch.backends.cuda.flash_sdp_enabled()


def test_invalid_settings_are_refused() -> None:
    wrong: Any = "fast"
    with pytest.raises(InputError, match=r"AttentionBackend\.backend: 'fast' must be one of fastest, flash, eff"):
        AttentionBackend(wrong)
    with pytest.raises(InputError, match="the model has no attention; remove the callback"):
        best_order([], "fastest", "cpu")


def test_ranks_use_the_first_ranks_choice(ranks: Callable[..., None], tmp_path: Path) -> None:
    ranks("agree", 2, str(tmp_path), str(write_table(tmp_path, 16)), script="ranks_attention.py")
