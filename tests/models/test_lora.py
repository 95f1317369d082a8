"""LoRA: only the additions are trainable, a checkpoint holds only them, and merging keeps the features."""

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lit_clip
from callbacks import EMA
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.models import registry
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.fingerprint import fingerprint
from lit_clip.models.lora import LoRA, add_lora, merge_lora, target_names
from lit_clip.module import LitCLIP
from lit_clip.tools.weight_files import read_tensors
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import CONFIG, PAIRS, finetuned_module, make_batch
from tests.models.test_finetune import external_towers
from tests.models.test_rates import same_features
from tests.test_module import data_for, trainer

MEMBERS = ("attn.in_proj_weight", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def base(tiny_config: CLIPConfig, tmp_path: Path) -> Path:
    save(CLIP(tiny_config), tmp_path / "base.ckpt", {})
    return tmp_path / "base.ckpt"


def randomize(model: nn.Module) -> None:
    """Give the additions an effect: their second factor starts at zero."""
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = make_batch(slice(0, 4))
    return model.normalize(batch.images).float(), batch.tokens


def test_attention_and_mlp_of_both_native_towers_get_additions() -> None:
    expected = [f"visual.transformer.resblocks.0.{member}" for member in MEMBERS]
    expected += [f"transformer.resblocks.{i}.{member}" for i in range(2) for member in MEMBERS]
    assert sorted(target_names(CLIP(CONFIG))) == sorted(expected)
    model = CLIP(CONFIG)
    add_lora(model, LoRA(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(expected) + 1
    assert {name.rpartition(".lora_")[1] for name in trained if name != "logit_scale"} == {".lora_"}


def test_additions_start_without_effect_and_reach_the_fused_weight() -> None:
    """Compare with W + alpha / r * B A, added by hand to the plain model's weights."""
    plain = CLIP(CONFIG).eval()
    model = copy.deepcopy(plain)
    add_lora(model, LoRA(r=3, alpha=6))
    images, tokens = inputs(plain)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), plain.encode_image(images))
        randomize(model)
        added = dict(model.named_parameters())
        for target in target_names(plain):
            owner, _, last = target.rpartition(".")
            holder = owner if last == "in_proj_weight" else target
            (a,) = (v for n, v in added.items() if plain_name(n) == f"{holder}.lora_A.default.weight")
            (b,) = (v for n, v in added.items() if plain_name(n) == f"{holder}.lora_B.default.weight")
            weight = plain.get_parameter(target if last == "in_proj_weight" else f"{target}.weight")
            weight += 6 / 3 * b @ a
        for encode, x in (("encode_image", images), ("encode_text", tokens)):
            torch.testing.assert_close(getattr(model, encode)(x), getattr(plain, encode)(x), rtol=0, atol=1e-5)


def plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


def test_merging_keeps_the_features_and_gives_a_plain_model() -> None:
    model = CLIP(CONFIG).eval()
    before = copy.deepcopy(model.state_dict())
    add_lora(model, LoRA(r=4))
    randomize(model)
    images, tokens = inputs(model)
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        merge_lora(model)
        merged = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    for ours, theirs in zip(merged, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    ends = {name.removesuffix(".weight").rpartition(".")[2] for name in changed}
    assert ends == {target.rpartition(".")[2] for target in MEMBERS}
    assert not any("lora" in type(module).__module__ for module in model.modules())


def test_timm_and_hugging_face_towers_get_additions_and_merge() -> None:
    model = CLIP(external_towers("test_vit")).eval()
    names = target_names(model)
    assert {name.rpartition(".")[2] for name in names if name.startswith("visual.")} == {"qkv", "proj", "fc1", "fc2"}
    ends = {name.rpartition(".")[2] for name in names if name.startswith("text.")}
    assert ends == {"query", "key", "value", "dense"}
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 7))

    def features() -> tuple[torch.Tensor, torch.Tensor]:
        return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)

    with torch.no_grad():
        plain = features()
        add_lora(model, LoRA(r=2))
        randomize(model)
        adapted = features()
        merge_lora(model)
        for merged, ours, before in zip(features(), adapted, plain, strict=True):
            torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)
            assert not torch.allclose(ours, before, atol=1e-3)


def test_a_frozen_tower_gets_no_additions(base: Path, tiny_config: CLIPConfig) -> None:
    module = LitCLIP(tiny_config, base, lora=LoRA(), freeze=Freeze(image="all"))
    added = [name for name, p in module.model.named_parameters() if p.requires_grad]
    assert len(added) == 2 * len(MEMBERS) + 1
    assert not any(name.startswith("visual.") for name in added)


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_holds_only_the_additions_and_opens_as_a_plain_model(
    ema: bool, base: Path, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(
        tiny_config,
        base,
        lora=LoRA(r=2),
        optimizer=partial(PaperAdamW, lr=0.01),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
    )
    callbacks = [EMA(0.5)] if ema else []
    fitting = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=False)
    fitting.fit(module, data_for(module, caption_table))
    fitting.save_checkpoint(tmp_path / "adapter.ckpt")
    checkpoint = torch.load(tmp_path / "adapter.ckpt", weights_only=True)
    for states in {"state_dict", "current_model_state"} & checkpoint.keys():
        assert len(checkpoint[states]) == 2 * 2 * len(MEMBERS) + 1
        assert all(".lora_" in name or name.endswith("logit_scale") for name in checkpoint[states])
    assert ("current_model_state" in checkpoint) == ema
    assert checkpoint["hyper_parameters"]["lora"] == {
        "r": 2,
        "alpha": 16.0,
        "tower": None,
        "head": False,
    }
    assert checkpoint["base"] == {"pretrained": str(base), "sha256": module.base_sha256}
    assert (tmp_path / "adapter.ckpt").stat().st_size < base.stat().st_size / 20

    plain, again = (
        lit_clip.load_model(tmp_path / "adapter.ckpt"),
        LitCLIP.load_from_checkpoint(tmp_path / "adapter.ckpt"),
    )
    changed = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert plain.state_dict().keys() == CLIP(tiny_config).state_dict().keys()
    assert not torch.equal(plain.state_dict()[changed], lit_clip.load_model(base).state_dict()[changed])
    for model in (plain, again.eval().model):
        same_features(model, module.eval().model)
    started = LitCLIP(tiny_config, tmp_path / "adapter.ckpt")
    assert torch.equal(started.model.visual.proj, plain.visual.proj)


@pytest.mark.parametrize(
    ("lora", "trained"), [({}, 3 * 2 * len(MEMBERS) + 1), ({"tower": "image", "head": True}, 2 * len(MEMBERS) + 33)]
)
def test_two_ranks_give_the_gradients_of_one_process(
    lora: dict[str, Any], trained: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    save(CLIP(CONFIG), tmp_path / "base.ckpt", {})
    options = json.dumps({"lora": {"r": 2, **lora}, "pretrained": str(tmp_path / "base.ckpt")})
    module = finetuned_module(options)
    module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    ranks("finetune_gradients", 2, str(tmp_path / "gradients.pt"), options)
    distributed = torch.load(tmp_path / "gradients.pt", weights_only=True)
    trainable = 0
    for name, parameter in module.model.named_parameters():
        if parameter.grad is None:
            assert distributed[name] is None, name
        else:
            trainable += 1
            torch.testing.assert_close(distributed[name], parameter.grad, rtol=1e-6, atol=1e-12, msg=name)
    assert trainable == trained


def test_an_adapter_refuses_another_base(base: Path, tiny_config: CLIPConfig, tmp_path: Path) -> None:
    module = LitCLIP(tiny_config, base, lora=LoRA(r=2))
    fitting = trainer(tmp_path)
    fitting.strategy.connect(module)
    fitting.save_checkpoint(tmp_path / "adapter.ckpt")
    save(CLIP(tiny_config), base, {})  # other weights at the same path
    for load in (lit_clip.load_model, LitCLIP.load_from_checkpoint):
        with pytest.raises(InputError, match="belongs to .*base.ckpt with other weights"):
            load(tmp_path / "adapter.ckpt")
    base.unlink()
    with pytest.raises(InputError, match=r"adapter.ckpt: cannot open the weights that its LoRA .*base.ckpt"):
        lit_clip.load_model(tmp_path / "adapter.ckpt")


def test_an_adapter_finds_its_base_beside_it_after_both_were_moved(
    base: Path, tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    fitting = trainer(tmp_path)
    fitting.strategy.connect(LitCLIP(tiny_config, base, lora=LoRA(r=2)))
    fitting.save_checkpoint(tmp_path / "adapter.ckpt")
    (tmp_path / "elsewhere").mkdir()
    for name in ("adapter.ckpt", "base.ckpt"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    names = ("elsewhere/adapter.ckpt", "elsewhere/base.ckpt")
    first, second = (lit_clip.load_model(tmp_path / name).state_dict()["visual.proj"] for name in names)
    assert torch.equal(first, second)
    module = LitCLIP.load_from_checkpoint(tmp_path / names[0])
    assert module.hparams["pretrained"] == str(tmp_path / names[1])


@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_of_resized_weights_can_be_loaded(
    named: bool, base: Path, tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config if named else None, base, 48, 12, lora=LoRA(r=2))
    randomize(module.model)
    fitting = trainer(tmp_path)
    fitting.strategy.connect(module)
    fitting.save_checkpoint(tmp_path / "adapter.ckpt")
    plain, again = (
        lit_clip.load_model(tmp_path / "adapter.ckpt"),
        LitCLIP.load_from_checkpoint(tmp_path / "adapter.ckpt"),
    )
    pixels, tokens = torch.randn(2, 3, 48, 48), plain.tokenize(["a cat"])
    assert tokens.shape == (1, 12)
    with torch.no_grad():
        for model in (plain, again.eval().model):
            torch.testing.assert_close(model.encode_image(pixels), module.model.encode_image(pixels), rtol=0, atol=1e-5)
            torch.testing.assert_close(model.encode_text(tokens), module.model.encode_text(tokens), rtol=0, atol=1e-5)


def test_an_adapter_of_a_tag_names_the_model_too(
    base: Path, tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_clip.weights.hub.download_tag", lambda name: downloads[name])
    state = read_tensors(base)
    monkeypatch.setitem(registry._TINY, "tiny", tiny_config)
    downloads = {"tiny:mine": (tmp_path / "tiny.safetensors", tiny_config)}
    save_file(state, tmp_path / "tiny.safetensors")
    fitting = trainer(tmp_path)
    fitting.strategy.connect(LitCLIP("tiny", "mine", lora=LoRA(r=2)))
    fitting.save_checkpoint(tmp_path / "adapter.ckpt")
    opened = lit_clip.load_model(tmp_path / "adapter.ckpt").state_dict()
    assert torch.equal(opened["visual.proj"], state["visual.proj"])


def test_unusable_settings_are_named(base: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="set model.pretrained"):
        LitCLIP(tiny_config, lora=LoRA())
    with pytest.raises(InputError, match="r: 0 must be at least 1"):
        LoRA(r=0)
    with pytest.raises(InputError, match="the blocks that are not frozen have no linear layers"):
        LitCLIP(tiny_config, base, lora=LoRA(), freeze=Freeze("all", "all"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="needs peft: pip install peft"):
        LitCLIP(tiny_config, base, lora=LoRA())


def test_an_addition_that_never_gets_a_gradient_is_an_error(
    base: Path, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """A layer whose weight is used without calling the layer would silently not train."""
    module = LitCLIP(tiny_config, base, lora=LoRA(r=2))
    mlp: Any = module.model.transformer.resblocks[0].mlp  # pyright: ignore
    mlp.forward = lambda x: mlp.c_proj(torch.relu(nn.functional.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)))
    with pytest.raises(InputError, match=r"c_fc.lora_A.default.weight has no effect"):
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data_for(module, caption_table))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"freeze": Freeze(image="all")}, ["image"]),
        ({"freeze": Freeze(text="all")}, ["text"]),
        ({"freeze": Freeze(image=UnlockLast(0))}, []),
        ({"lora": LoRA(r=2)}, []),
        ({"lora": LoRA(r=2, tower="text")}, []),
        ({"lora": LoRA(r=2, tower="text"), "freeze": Freeze(image="all")}, ["image"]),
    ],
)
def test_a_training_keeps_the_vectors_of_what_it_freezes(
    options: dict[str, Any], kept: list[str], base: Path, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """The table of docs/products.md; stored vectors are searched as long as the fingerprint of their encoder stays."""
    module = LitCLIP(
        tiny_config,
        base,
        optimizer=partial(PaperAdamW, lr=0.01),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
        **options,
    )
    fitting = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    fitting.fit(module, data_for(module, caption_table))
    fitting.save_checkpoint(tmp_path / "tuned.ckpt")
    before, after = (fingerprint(lit_clip.load_model(path)) for path in (base, tmp_path / "tuned.ckpt"))
    assert [name for name in ("image", "text") if getattr(before, name) == getattr(after, name)] == kept
