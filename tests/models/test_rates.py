"""Each part has its rate, weight decay and kind: equal to loops with torch's groups and peft, resumed, refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import lit_clip
from callbacks import EMA, PrintPlan
from lit_clip import LitCLIP
from lit_clip.batch import CaptionBatch
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sum
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig
from lit_clip.models.rates import Rates, rated_layers
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.plan import print_plan_of
from lit_clip.training.schedules import WarmupConstant
from tests.helpers.small_sets import data_for, make_trainer, write_table
from tests.losses.test_loss import Tempered
from tests.models.test_finetune import external_towers

RATE, DECAY, STEPS = 1e-2, 0.2, 3
RATES: dict[str, Any] = {
    "image": 0.1,
    "text": {"lr": 2.0, "weight_decay": 0.5},
    "head": {"lr": 10.0, "weight_decay": 0.0},
    "temperature": 3.0,
    "layer_decay": {"text": 0.5},
}


class Batches(Callback):
    """Keep every training batch, and the groups' rates."""

    def __init__(self) -> None:
        self.seen: list[CaptionBatch] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        self.seen.append(batch)
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("rates"), 16)


@pytest.fixture
def base(tiny_config: CLIPConfig, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save(CLIP(tiny_config), tmp_path / "base.ckpt", {})
    return tmp_path / "base.ckpt"


def make(config: CLIPConfig, base: Path | None = None, **options: Any) -> LitCLIP:
    torch.manual_seed(0)
    options.setdefault("lr_scheduler", partial(WarmupConstant, warmup_steps=0))
    options.setdefault("optimizer", partial(PaperAdamW, lr=RATE, weight_decay=DECAY))
    return LitCLIP(config, base, **options)


def fit(
    module: LitCLIP, table: Path, callbacks: list[Any], ckpt_path: Path | None = None, epochs: int = 2, **options: Any
) -> Any:
    """Train four steps an epoch."""
    options = {"limit_val_batches": 0, "max_epochs": epochs, "enable_checkpointing": bool(callbacks[1:]), **options}
    fitting = make_trainer(table.parent, callbacks, **options)
    fitting.fit(module, data_for(module, table), ckpt_path=ckpt_path, weights_only=True)
    return fitting


def loop(model: Any, groups: list[dict[str, Any]], batches: list[CaptionBatch]) -> None:
    """Train a model in torch alone."""
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    for batch in batches:
        image = F.normalize(model.encode_image(model.normalize(batch.images)), dim=-1)
        text = F.normalize(model.encode_text(batch.tokens), dim=-1)
        logits, target = model.logit_scale.exp() * image @ text.T, torch.arange(len(image))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def named_groups(model: nn.Module, factors: Callable[[str], tuple[float, float]]) -> list[dict[str, Any]]:
    """Return a group for each trained parameter, with the factors of its name."""
    return [
        {"params": [p], "lr": RATE * factors(name)[0], "weight_decay": DECAY * factors(name)[1] * (p.ndim >= 2)}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def factors_of(name: str) -> tuple[float, float]:
    """Return what ``RATES`` say of a parameter of one block an encoder."""
    if name in ("visual.proj", "text_projection") or "ln_post" in name or "ln_final" in name:
        return 10, 0
    if name.startswith("visual."):
        return 0.1, 1
    if name == "logit_scale":
        return 3, 1
    return (2 * 0.5, 0.5) if "resblocks" in name else (2 * 0.25, 0.5)


def test_three_steps_equal_a_loop_with_torchs_parameter_groups(tiny_config: CLIPConfig, table: Path) -> None:
    module, batches = make(tiny_config, rates=RATES), Batches()
    plain = copy.deepcopy(module.model).double()
    before = copy.deepcopy(plain.state_dict())
    fit(module, table, [batches], max_steps=STEPS, precision="64-true")
    loop(plain, named_groups(plain, factors_of), batches.seen)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)
    moved = {name: (value - before[name]).abs().max() for name, value in plain.state_dict().items()}
    assert moved["visual.proj"] > 50 * moved["visual.transformer.resblocks.0.mlp.c_fc.weight"] > 0


@pytest.mark.parametrize("ema", [False, True])
def test_a_full_encoder_beside_a_lora_equals_peft_by_hand(
    ema: bool, base: Path, tiny_config: CLIPConfig, table: Path, tmp_path: Path
) -> None:
    """With the head of the encoder that has additions; the checkpoint has what is trained, and opens whole."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = {"r": 2, "tower": "image", "head": True}
    module, batches = make(tiny_config, base, lora=lora, rates={"image": 2.0, "text": 0.1}), Batches()
    by_hand: Any = lit_clip.load_model(base).double()
    fused = "transformer.resblocks.0.attn.in_proj_weight"
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["c_fc", "c_proj", "out_proj"], target_parameters=[fused])
    inject_adapter_in_model(config, by_hand.visual)
    by_hand.load_state_dict(module.model.state_dict())  # the same random additions
    for name, parameter in by_hand.named_parameters():
        head = "ln_post" in name or name == "visual.proj"
        parameter.requires_grad_(".lora_" in name or head or not name.startswith("visual."))
    callbacks = [batches, *([EMA(0.5)] if ema else [])]
    trainer = fit(module, table, callbacks, max_steps=STEPS, precision="64-true")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loop(by_hand, named_groups(by_hand, _twice_or_tenth), batches.seen)
    trained = {name for name, p in by_hand.named_parameters() if p.requires_grad}
    assert len(trained) < len(by_hand.state_dict())
    for states in {"state_dict", "current_model_state"} & checkpoint.keys():
        assert {name.removeprefix("model.") for name in checkpoint[states]} == trained
    last = checkpoint["current_model_state" if ema else "state_dict"]
    for name in trained:
        value = last[f"model.{name}" if ema else name]
        torch.testing.assert_close(value, by_hand.get_parameter(name).detach(), rtol=0, atol=1e-7, msg=name)
    whole, again = lit_clip.load_model(tmp_path / "last.ckpt"), LitCLIP.load_from_checkpoint(tmp_path / "last.ckpt")
    assert whole.state_dict().keys() == lit_clip.load_model(base).state_dict().keys()
    same_features(whole, module.eval().model.float())
    same_features(again.eval().model, module.model)


def _twice_or_tenth(name: str) -> tuple[float, float]:
    return (1.0 if name == "logit_scale" else 2.0 if name.startswith("visual.") else 0.1), 1.0


@torch.no_grad()
def same_features(model: CLIP, other: CLIP) -> None:
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenize(["a red patch", "white"])
    for ours, theirs in (
        (model.encode_image(images, normalize=True), other.encode_image(images, normalize=True)),
        (model.encode_text(tokens, normalize=True), other.encode_text(tokens, normalize=True)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_statistics_of_a_full_resnet_are_kept_beside_a_lora_of_the_texts(
    tiny_config: CLIPConfig, table: Path, tmp_path: Path
) -> None:
    config = replace(tiny_config, image=ResNetConfig((1, 1, 1, 1), 8, 32))
    save(CLIP(config), tmp_path / "base.ckpt", {})
    module = make(config, tmp_path / "base.ckpt", lora={"r": 2, "tower": "text"})
    fit(module, table, [Batches()], max_steps=STEPS).save_checkpoint(tmp_path / "last.ckpt")
    same_features(lit_clip.load_model(tmp_path / "last.ckpt"), module.eval().model)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "visual.bn1.running_mean" in saved
    assert "token_embedding.weight" not in saved


def test_a_resumed_run_ends_with_the_same_bits_or_has_its_new_factors(
    base: Path, tiny_config: CLIPConfig, table: Path, tmp_path: Path
) -> None:
    def run(name: str, ckpt_path: Path | None = None, **rates: Any) -> tuple[LitCLIP, dict[str, float]]:
        lora = {"r": 2, "tower": "image", "head": True}
        module, batches = make(tiny_config, base, lora=lora, rates=RATES | rates), Batches()
        saving = ModelCheckpoint(tmp_path, name, every_n_train_steps=5)
        fit(module, table, [batches, saving], ckpt_path, limit_val_batches=0)
        return module, batches.rates[-1]

    (whole, rates), path = run("middle"), tmp_path / "middle.ckpt"
    resumed, again = run("again", path)
    assert rates == again
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert rates["image"] == pytest.approx(0.1 * RATE)
    assert rates["text.blocks.0"] == pytest.approx(2 * 0.5 * RATE)
    _, changed = run("changed", path, image=0.3, temperature=0.5)  # another order of the rates, not of the groups
    assert changed == pytest.approx(rates | {"image": 0.3 * RATE, "temperature, no decay": 0.5 * RATE})
    with pytest.raises(InputError, match=r"middle.ckpt: resume with the model.freeze, parts of model.rates, lora"):
        run("other", path, head=None, layer_decay=1.0)


def test_a_losss_own_parameters_are_rated_as_the_head(tiny_config: CLIPConfig) -> None:
    for rates, factor in (({"head": 4.0}, 4), ({"image": 4.0}, 1)):
        module = make(tiny_config, loss=Sum([Contrastive(), Tempered()]), rates=rates)
        groups = module.optimization.groups(module)
        assert {group["lr"] for group in groups if group["name"].startswith("loss")} == {RATE * factor}


def test_a_part_without_factors_needs_no_layers_and_a_head_has_those_of_its_encoder(tiny_config: CLIPConfig) -> None:
    model = CLIP(tiny_config)
    coarse = {layer.name: layer.rate.lr for layer in rated_layers(model, Rates(image=0.1))}
    assert coarse == {"image": 0.1, "text": 1, "temperature": 1}
    fine = {layer.name: layer.rate.lr for layer in rated_layers(model, Rates(image=0.1, layer_decay=0.5))}
    assert fine["image.head"] == 0.1
    assert fine["image.blocks.0"] == pytest.approx(0.05)


def test_frozen_heads_and_temperature_stay_and_dropout_before_them_is_active(
    tiny_config: CLIPConfig, table: Path
) -> None:
    module = make(tiny_config, freeze={"head": True, "temperature": True})
    with torch.no_grad():
        module.model.logit_scale.fill_(5)  # above 100, to which a trained one is clamped
    before = copy.deepcopy(module.model.state_dict())
    fit(module, table, [Batches()], max_steps=1)
    same = {name for name, value in module.model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {
        *("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias", "logit_scale"),
        *("text_projection", "ln_final.weight", "ln_final.bias"),
    }
    model: Any = LitCLIP(external_towers("test_vit"), freeze={"head": True}).model
    assert model.text.transformer.embeddings.dropout.training
    assert not model.text.proj.training
    assert model.visual.trunk.blocks[0].training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {"vision": 0.1}}, "model.rates: has no setting 'vision'; there are image, text, head, temperature"),
        ({"rates": {"image": 0}}, "model.rates.image: 0 must be above 0; model.freeze keeps a part as it is"),
        ({"rates": {"text": {"lr": -1.0}}}, "model.rates.text: -1 must be above 0"),
        ({"rates": {"head": {"weight_decay": -1.0}}}, "model.rates.weight_decay: -1.0 must be at least 0"),
        ({"rates": {"head": {"rate": 1.0}}}, "model.rates.head: has no setting 'rate'; there are lr, weight_decay"),
        ({"rates": {"image": 2.0}, "freeze": {"image": "all"}}, "model.rates.image: this part is frozen"),
        ({"rates": {"head": 2.0}, "freeze": {"head": True}}, "model.rates.head: this part is frozen"),
        (
            {"rates": {"image": {"weight_decay": 2.0}}, "optimizer": partial(torch.optim.SGD, lr=0.1)},
            "model.rates.image: weight_decay 2 of none; set model.optimizer.weight_decay",
        ),
        (
            {"rates": {"image": 2.0}, "lr_scheduler": partial(OneCycleLR, max_lr=0.1)},
            "model.lr_scheduler: OneCycleLR has one rate for all parts; leave out model.rates",
        ),
        ({"freeze": {"image": "all", "text": "all", "temperature": True}}, "model.freeze: freezes everything"),
        ({"freeze": {"text": {"unlock_last": 0}, "head": True}}, "model.freeze.text: unlock_last 0 with head: true"),
        ({"lora": {"tower": "vision"}}, "model.lora.tower: 'vision' must be one of 'image', 'text'"),
        ({"lora": {"tower": "image"}, "freeze": {"image": "all"}}, "the blocks that are not frozen have no linear"),
        ({"lora": {"head": True}, "freeze": {"head": True}}, "model.lora: head is true, and model.freeze freezes"),
    ],
)
def test_what_names_no_part_or_trains_nothing_is_refused_in_one_line(
    options: dict[str, Any], message: str, base: Path, tiny_config: CLIPConfig, table: Path
) -> None:
    with pytest.raises(InputError) as error:
        fit(make(tiny_config, base, **options), table, [Batches()], max_steps=1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_plan_lists_kind_rate_and_decay_of_each_part(
    base: Path, tiny_config: CLIPConfig, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, rates = {"r": 2, "tower": "image"}, {"text": {"lr": 0.1, "weight_decay": 0.5}}
    module = make(tiny_config, base, lora=lora, rates=rates, freeze={"temperature": True})
    print_plan_of(make_trainer(tmp_path, [], max_epochs=1), module, data_for(module, table))
    planned = capsys.readouterr().out
    fit(module, table, [PrintPlan()], max_steps=1)
    for printed in (planned, capsys.readouterr().out):
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
        found = {(row[0], row[1]): row[3:] for row in rows if len(row) == 5}
        assert found == {
            ("image", "LoRA"): ["1.00e-02", "0.2"],
            ("text", "full"): ["1.00e-03", "0.1"],
            ("text, no decay", "full"): ["1.00e-03", "0"],
            ("image", "frozen"): ["", ""],
            ("temperature", "frozen"): ["", ""],
        }
