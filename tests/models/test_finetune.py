"""Fine-tuning: frozen parameters stay unchanged, layers have their own learning rates, and the change is reported."""

import csv
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.finetuning import Freeze, UnlockLast, frozen_modules, frozen_names
from lit_clip.models.layers import layer_groups, tower_parameters
from lit_clip.models.rates import LayerDecay, Rates
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import TINY_YAML
from tests.helpers.ranks import CONFIG, PAIRS, finetuned_module, make_batch
from tests.test_module import data_for, trainer

Cli = Callable[..., subprocess.CompletedProcess[str]]


def bert_sizes() -> dict[str, Any]:
    """Return a tiny BERT's configuration as plain values."""
    from transformers import BertConfig

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(vocab_size=99, intermediate_size=64, **sizes)
    return json.loads(config.to_json_string(use_diff=False))


def external_towers(image: str) -> CLIPConfig:
    """Return a model with a timm image tower and a Hugging Face text tower."""
    text = HuggingFaceTextConfig("nowhere", pretrained=False, context_length=16, model=bert_sizes())
    return CLIPConfig(embed_dim=16, image=TimmConfig(image, image_size=32), text=text)


def resnet() -> CLIPConfig:
    return CLIPConfig(
        embed_dim=16,
        image=ResNetConfig(layers=(1, 2, 3, 1), width=8, image_size=32),
        text=TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=1, heads=1),
    )


def siglip() -> CLIPConfig:
    return CLIPConfig(
        embed_dim=64,
        image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=1, heads=1, causal=False),
        logit_bias=True,
    )


def parts_of(model: CLIP, tower: Any) -> dict[str, set[str]]:
    return {
        group.name: {".".join(name.split(".")[:3]) for name in group.parameters} for group in layer_groups(model, tower)
    }


def test_layer_groups_of_the_papers_towers_go_from_embeddings_to_projection() -> None:
    image, text = (parts_of(CLIP(CONFIG), tower) for tower in ("image", "text"))
    assert list(image) == ["embeddings", "blocks.0", "head"]
    assert image["embeddings"] == {
        *("visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"),
        *("visual.ln_pre.weight", "visual.ln_pre.bias"),
    }
    assert image["head"] == {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    assert list(text) == ["embeddings", "blocks.0", "blocks.1", "head"]
    assert text["embeddings"] == {"positional_embedding", "token_embedding.weight"}
    assert text["blocks.1"] == {"transformer.resblocks.1"}
    assert text["head"] == {"text_projection", "ln_final.weight", "ln_final.bias"}


def test_layer_groups_of_a_resnet_are_the_blocks_of_its_stages() -> None:
    groups = parts_of(CLIP(resnet()), "image")
    assert list(groups) == ["embeddings", *(f"blocks.{i}" for i in range(7)), "head"]
    assert groups["blocks.3"] == {"visual.layer3.0"}
    stem = {f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)}
    assert {name.split(".")[1] for name in groups["embeddings"]} == stem
    assert {name.split(".")[1] for name in groups["head"]} == {"attnpool"}


@pytest.mark.parametrize(("name", "blocks"), [("test_vit", 6), ("test_resnet", 4), ("test_convnext", 9)])
def test_layer_groups_of_timm_towers_are_timms(name: str, blocks: int) -> None:
    model: Any = CLIP(external_towers(name))
    groups = layer_groups(model, "image")
    assert [group.name for group in groups] == ["embeddings", *(f"blocks.{i}" for i in range(blocks)), "head"]
    order = timm.models.group_parameters(model.visual.trunk, model.visual.trunk.group_matcher(coarse=False))
    for group, names in zip(groups[:-1], order.values(), strict=False):
        assert list(group.parameters) == [f"visual.trunk.{name}" for name in names]
    assert "visual.head.proj.weight" in groups[-1].parameters


def test_layer_groups_of_a_hugging_face_encoder_are_its_layers() -> None:
    groups = parts_of(CLIP(external_towers("test_vit")), "text")
    assert list(groups) == ["embeddings", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert groups["embeddings"] == {"text.transformer.embeddings"}
    assert groups["blocks.2"] == {"text.transformer.encoder"}
    assert groups["head"] == {"text.proj.weight"}


@pytest.mark.parametrize("make", [partial(external_towers, "test_vit"), resnet, siglip, lambda: CONFIG])
def test_every_parameter_of_a_tower_is_in_exactly_one_group(make: Callable[[], CLIPConfig]) -> None:
    model = CLIP(make())
    for tower in ("image", "text"):
        names = [name for group in layer_groups(model, tower) for name in group.parameters]
        assert len(names) == len(set(names))
        assert set(names) == set(tower_parameters(model, tower))
    assert len(tower_parameters(model, "image")) + len(tower_parameters(model, "text")) == len(
        [name for name, _ in model.named_parameters() if not name.startswith("logit_")]
    )


def test_only_frozen_batch_norm_and_dropout_stay_in_evaluation_mode() -> None:
    model: Any = CLIP(external_towers("test_resnet"))
    frozen = frozen_names(model, Freeze(image=UnlockLast(1), text=UnlockLast(2)))
    model.train()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for module in frozen_modules(model).values():
        module.eval()
    trunk, encoder = model.visual.trunk, model.text.transformer
    training = {i: {m.training for m in stage.modules()} for i, stage in enumerate(trunk.children())}
    last = list(trunk.children()).index(trunk.layer4)
    assert all(modes == {False} for i, modes in training.items() if i < last)
    assert training[last] == {True}
    assert not encoder.embeddings.dropout.training
    assert [layer.attention.output.dropout.training for layer in encoder.encoder.layer] == [False, True, True]
    assert model.visual.head.training


def test_a_frozen_module_keeps_its_mode_and_weights_during_training(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """A real fit with validations: the image tower is frozen (LiT), and so is the first of two text blocks."""
    tiny_config.text.layers = 2
    module = LitCLIP(
        tiny_config, freeze=Freeze(image="all", text=UnlockLast(1)), lr_scheduler=partial(WarmupCosine, warmup_steps=1)
    )
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    modes: list[tuple[bool, bool, bool]] = []
    blocks: Any = module.model.transformer.resblocks

    def record(*_: Any) -> None:
        modes.append((module.model.visual.training, blocks[0].training, blocks[1].training))

    module.on_train_batch_start = record
    fitting = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    fitting.fit(module, data_for(module, caption_table))
    assert set(modes) == {(False, False, True)}
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    in_optimizer = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    trained = {name for name, p in module.model.named_parameters() if id(p) in in_optimizer}
    assert changed == trained
    assert {name.split(".")[0] for name in trained} == {"transformer", "ln_final", "text_projection", "logit_scale"}
    assert all(name.startswith("transformer.resblocks.1.") for name in trained if name.startswith("transformer"))


def test_batch_norm_keeps_the_statistics_of_pretraining_while_its_weights_are_trained(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """Also after a validation, and after a resume, for which the checkpoint says so."""
    tiny_resnet = replace(tiny_config, image=ResNetConfig((1, 1, 1, 1), 8, 32))
    schedule: Any = partial(WarmupCosine, warmup_steps=1)
    module = LitCLIP(tiny_resnet, freeze=Freeze(batch_norm=True), lr_scheduler=schedule)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    for epochs, path in ((1, None), (2, tmp_path / "last.ckpt")):
        fitting = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        fitting.fit(module, data_for(module, caption_table), ckpt_path=path)
        fitting.save_checkpoint(tmp_path / "last.ckpt")
        module = LitCLIP.load_from_checkpoint(tmp_path / "last.ckpt")
    same = {name for name, value in module.model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if "running_" in name or "num_batches" in name}


def test_batch_norm_that_is_not_there_cannot_be_frozen(tiny_config: CLIPConfig) -> None:
    with pytest.raises(InputError, match="model.freeze.batch_norm: the encoders have no BatchNorm; leave it out"):
        LitCLIP(tiny_config, freeze=Freeze(batch_norm=True))


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"freeze": {"image": {"unlock_last": 0}, "text": {"unlock_last": 1}}}, 19),
        ({"architecture": resnet(), "freeze": {"image": "all"}}, 18),  # BatchNorm in training mode differs by rank
        ({"architecture": external_towers("test_vit"), "freeze": {"image": {"unlock_last": 1}, "text": "all"}}, 16),
        ({"architecture": siglip()}, 39),
    ],
)
def test_gradients_of_two_ranks_without_find_unused_parameters_equal_one_process(
    options: dict[str, Any], trained: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    words = json.dumps(options, default=CLIPConfig.to_dict)
    module = finetuned_module(words)
    module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    ranks("finetune_gradients", 2, str(tmp_path / "gradients.pt"), words)
    distributed = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in module.model.named_parameters():
        if parameter.grad is None:
            assert distributed[name] is None, name
        else:
            torch.testing.assert_close(distributed[name], parameter.grad, rtol=1e-6, atol=1e-12, msg=name)
    assert sum(gradient is not None for gradient in distributed.values()) == trained


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({"image": {"unlock_last": 2}}, "model.freeze.image: unlock_last 2, but the tower has 1 blocks"),
        ({"text": {"unlock_last": -1}}, "unlock_last: -1 must be at least 0"),
    ],
)
def test_unlocking_an_impossible_number_of_blocks_is_refused(freeze: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LitCLIP(CONFIG, freeze=freeze)


def rates(module: LitCLIP) -> dict[str, float]:
    """Return every trainable parameter's learning rate; each must be in one group."""
    names = {id(p): name for name, p in module.model.named_parameters()}
    found: dict[str, float] = {}
    for group in module.optimization.groups(module):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"]
    return found


def test_layer_decay_lowers_the_learning_rate_of_each_earlier_layer() -> None:
    module = LitCLIP(
        CONFIG, rates=Rates(layer_decay=LayerDecay(image=0.5, text=0.1)), optimizer=partial(PaperAdamW, lr=1.0)
    )
    found = rates(module)
    assert found.keys() == dict(module.model.named_parameters()).keys()
    expected = {
        **{"visual.proj": 1.0, "visual.ln_post.bias": 1.0, "visual.transformer.resblocks.0.ln_1.weight": 0.5},
        **{"visual.conv1.weight": 0.25, "visual.ln_pre.weight": 0.25, "logit_scale": 1.0, "text_projection": 1.0},
        **{"transformer.resblocks.1.mlp.c_fc.weight": 0.1, "transformer.resblocks.0.mlp.c_fc.bias": 0.01},
        **{"token_embedding.weight": 0.001, "positional_embedding": 0.001},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    decays = {id(p): group["weight_decay"] for group in module.optimization.groups(module) for p in group["params"]}
    assert all((decays[id(p)] > 0) == (p.ndim >= 2) for p in module.model.parameters())
    assert module.optimization.groups(module)[0]["lr"] == 1.0  # logged as train/learning_rate


def test_frozen_parameters_are_in_no_group_with_layer_decay() -> None:
    module = LitCLIP(CONFIG, rates={"layer_decay": 0.5}, freeze=Freeze(image=UnlockLast(0), text=UnlockLast(1)))
    assert rates(module).keys() == {name for name, p in module.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan")])
def test_a_layer_decay_outside_0_to_1_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"model\.rates.*layer_decay"):
        LitCLIP(CONFIG, rates={"layer_decay": decay})


def command(table: Path, *options: str) -> list[str]:
    return [
        *("fit", "--data", "datamodules.Captions", "--data.val", str(table), "--data.batch_size", "16"),
        *("--data.num_workers", "0", "--trainer.accelerator", "cpu", "--data.train", str(table)),
        *("--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "1", "--model.optimizer.lr", "0.01"),
        *("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.init_args.save_dir", "logs"),
        *("--trainer.enable_progress_bar", "false", *options),
    ]


def metrics(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_freeze_and_rates_in_yaml_are_printed_unchanged(in_process: Cli, caption_table: Path, tmp_path: Path) -> None:
    freeze = {"image": "all", "text": {"unlock_last": 1}, "head": False, "temperature": True, "batch_norm": False}
    rates = {"image": 1.0, "text": {"lr": 0.1, "weight_decay": 2.0}, "head": 10.0, "temperature": 1.0}
    finetune = {"freeze": freeze, "rates": rates | {"layer_decay": {"image": 1.0, "text": 0.5}}}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump({"model": finetune}))
    result = in_process(*command(caption_table, "--config", "finetune.yaml", "--print_config"))
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)["model"]
    assert {name: printed[name] for name in finetune} == finetune


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_validate_first_logs_at_step_0_and_the_change_is_reported_also_after_a_resume(
    devices: int, cli: Cli, caption_table: Path, tmp_path: Path
) -> None:
    options = ["--validate_first", "true", "--model.freeze", "{image: all}", "--model.rates.layer_decay", "0.5"]
    ddp = [] if devices == 1 else ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    result = cli(*command(caption_table, *options, *ddp, "--trainer.max_epochs", "1"))
    assert result.returncode == 0, result.stderr
    rows = [row for row in metrics(tmp_path / "logs") if row["val/loss"]]
    assert [row["step"] for row in rows] == ["0", "3"]
    losses = [float(row["val/loss"]) for row in rows]
    assert "before" in result.stdout
    assert "Trained" in result.stdout
    assert f"{losses[1] - losses[0]:+.4f}" in result.stdout
    assert losses[0] != losses[1]
    if devices == 2:
        return
    (path,) = (tmp_path / "logs").rglob("*.ckpt")
    again = ["--validate_first", "true", "--ckpt_path", str(path), "--trainer.max_epochs", "2"]
    again += ["--trainer.logger.init_args.save_dir", "again"]
    resumed = cli(*command(caption_table, *again))
    assert resumed.returncode == 0, resumed.stderr
    later = [row for row in metrics(tmp_path / "again") if row["val/loss"]]
    assert [row["step"] for row in later] == ["7"]  # not validated first again
    assert f"{float(later[0]['val/loss']) - losses[0]:+.4f}" in resumed.stdout


def test_a_fast_dev_run_validates_first_too(cli: Cli, caption_table: Path) -> None:
    result = cli(*command(caption_table, "--validate_first", "true", "--trainer.fast_dev_run", "true"))
    assert result.returncode == 0, result.stderr
    assert "before" in result.stdout
