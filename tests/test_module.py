"""LitCLIP learns, and its checkpoints are complete and safe to load."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data._utils.pin_memory import pin_memory

import callbacks
import lit_clip
from datamodules import Captions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.models.registry import resolve_architecture
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine, warmup_cosine
from lit_clip.weights.load import load_model


def trainer(folder: Path, **options: Any) -> Trainer:
    """Return a quiet trainer on the CPU: no validation before training, no checkpoints but those of given callbacks."""
    saves = any(isinstance(each, ModelCheckpoint) for each in options.get("callbacks") or [])
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_checkpointing": saves,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        **options,
    }
    return Trainer(**settings)


class SaveAt(Callback):
    """Save a checkpoint at the end of the epoch that ends at a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def data_for(module: LitCLIP, table: Path, **options: Any) -> Captions:
    settings: dict[str, Any] = {"batch_size": 16, "num_workers": 0, **options}
    data = Captions(str(table), str(table), **settings)
    data.preprocessing, data.tokenize = module.preprocessing, module.tokenize  # for use without a trainer
    return data


@pytest.fixture
def checkpoint(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> tuple[LitCLIP, Path]:
    module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=2))
    fitting = trainer(tmp_path, max_epochs=1)
    fitting.fit(module, data_for(module, caption_table))
    fitting.save_checkpoint(tmp_path / "model.ckpt")
    return module, tmp_path / "model.ckpt"


def test_overfits_64_real_pairs(overfitted: tuple[Path, Path]) -> None:
    """In-batch accuracy 1.0 in both directions shows that every part of the path is connected."""
    checkpoint, table = overfitted
    module = LitCLIP.load_from_checkpoint(checkpoint).eval()
    data = data_for(module, table, batch_size=64)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        image, text = module(batch)
    scores, target = image @ text.T, torch.arange(64)
    assert (scores.argmax(dim=1) == target).all()
    assert (scores.argmax(dim=0) == target).all()


def test_a_checkpoint_loads_without_unpickling_and_without_arguments(checkpoint: tuple[LitCLIP, Path]) -> None:
    module, path = checkpoint
    torch.load(path, weights_only=True)  # plain values and tensors only
    loaded = LitCLIP.load_from_checkpoint(path)
    for (name, ours), theirs in zip(module.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loaded.preprocessing.image_size == 32
    assert loaded.tokenize(["a dog"]).shape == (1, 16)


def test_load_model_needs_nothing_but_the_checkpoint(checkpoint: tuple[LitCLIP, Path]) -> None:
    module, path = checkpoint
    model = lit_clip.load_model(path)
    assert not model.training
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    module.eval()
    with torch.no_grad():
        images, tokens = model.preprocess(image)[None], model.tokenize(["a dog"])
        torch.testing.assert_close(model.encode_image(images), module.model.encode_image(images))
        torch.testing.assert_close(model.encode_text(tokens), module.model.encode_text(tokens))


def test_open_clip_loads_our_checkpoint_unchanged(checkpoint: tuple[LitCLIP, Path]) -> None:
    module, path = checkpoint
    theirs = open_clip.CLIP(
        16,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64},
        text_cfg={"context_length": 16, "width": 16, "layers": 1, "heads": 1},
    )
    open_clip.load_checkpoint(theirs, str(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = module.eval().model.encode_image(images)
        torch.testing.assert_close(theirs.eval().encode_image(images), expected, atol=1e-5, rtol=0)


def test_the_learning_rate_follows_the_schedule_every_step_and_across_a_resume(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """Per step, not per epoch (footgun L11), over the whole run, before and after a resume."""
    total, rates = 12, []

    class Recorder(LitCLIP):
        def on_train_batch_start(self, batch: CaptionBatch, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def module() -> Recorder:
        return Recorder(
            tiny_config, optimizer=partial(PaperAdamW, lr=0.01), lr_scheduler=partial(WarmupCosine, warmup_steps=3)
        )

    first, second, path = module(), module(), tmp_path / "epoch.ckpt"
    fitting = trainer(
        tmp_path, max_epochs=3, limit_val_batches=0, callbacks=[SaveAt(4, path)], enable_checkpointing=False
    )
    fitting.fit(first, data_for(first, caption_table))  # 64 pairs, 16 a step: 4 steps an epoch
    expected = [0.01 * warmup_cosine(step, 3, total) for step in range(total)]
    assert rates == pytest.approx(expected)

    rates.clear()
    middle = torch.load(path, weights_only=True)
    assert middle["global_step"] == 4
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(second, data_for(second, caption_table), ckpt_path=path)
    assert rates == pytest.approx(expected[4:])


def test_the_temperature_is_clamped_after_every_step(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
    with torch.no_grad():
        module.model.logit_scale.fill_(10.0)
    keep = ModelCheckpoint(tmp_path, "step", every_n_train_steps=1)  # its hook comes before the module's
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[keep]).fit(module, data_for(module, caption_table))
    saved = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]["logit_scale"]
    assert saved.exp().item() == pytest.approx(100)


def test_training_repeats_exactly_under_a_seed(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    weights = []
    for disturbance in (0, 1):
        torch.manual_seed(3)
        module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
        random.seed(disturbance)  # nothing may draw from a global generator
        torch.manual_seed(disturbance)
        fitting = trainer(tmp_path, max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
        fitting.fit(module, data_for(module, caption_table))
        weights.append(module.model.visual.proj.detach().clone())
    assert torch.equal(weights[0], weights[1])


def test_test_equals_validate_and_predict_returns_features_in_table_order(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config)
    (validated,) = trainer(tmp_path).validate(module, data_for(module, caption_table), verbose=False)
    (tested,) = trainer(tmp_path).test(module, data_for(module, caption_table), verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == validated
    batches: Any = trainer(tmp_path).predict(module, data_for(module, caption_table))
    data = data_for(module, caption_table, batch_size=64)
    data.setup("validate")
    whole = next(iter(data.val_dataloader()))
    assert [key for batch in batches for key in batch["keys"]] == whole.keys
    with torch.no_grad():
        image, text = module.eval()(whole)
    torch.testing.assert_close(torch.cat([batch["image"] for batch in batches]), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([batch["text"] for batch in batches]), text, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped_in_any_precision(
    precision: Any, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    norms: list[float] = []

    class Norms(LitCLIP):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norms.extend([float(torch.nn.utils.get_total_norm(gradients))] if gradients else [])

    module = Norms(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
    options: dict[str, Any] = {"gradient_clip_val": 0.01, "precision": precision, "enable_checkpointing": False}
    trainer(tmp_path, max_steps=2, limit_val_batches=0, **options).fit(module, data_for(module, caption_table))
    assert norms
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


def test_the_default_architecture_is_that_of_the_weights_or_vit_b_32(tiny_checkpoint: Path) -> None:
    assert LitCLIP(pretrained=tiny_checkpoint).model.config == load_model(tiny_checkpoint).config
    with torch.device("meta"):
        assert LitCLIP().model.config == resolve_architecture("ViT-B-32")


def test_a_checkpoint_keeps_an_interpolated_image_size_and_context_length(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module = LitCLIP(pretrained=tiny_checkpoint, image_size=64, context_length=20)
    assert module.preprocessing.image_size == 64
    assert module.tokenize.context_length == 20
    expected = load_model(tiny_checkpoint, image_size=64, context_length=20)
    assert torch.equal(module.model.visual.positional_embedding, expected.visual.positional_embedding)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "larger.ckpt", weights_only=True)
    assert load_model(tmp_path / "larger.ckpt").config == expected.config
    again = LitCLIP.load_from_checkpoint(tmp_path / "larger.ckpt", map_location="cpu", weights_only=True)
    assert again.preprocessing.image_size == 64


def test_training_cannot_resume_from_weights_only(tiny_checkpoint: Path, caption_table: Path, tmp_path: Path) -> None:
    module = LitCLIP.load_from_checkpoint(tiny_checkpoint)
    with pytest.raises(InputError, match=r"tiny.ckpt: holds weights only, .*; start from it with model.pretrained"):
        trainer(tmp_path).fit(module, data_for(module, caption_table), ckpt_path=tiny_checkpoint)
    trainer(tmp_path).validate(module, data_for(module, caption_table), ckpt_path=tiny_checkpoint)


def test_a_subclass_with_its_own_training_step_is_trained(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    class Pull(LitCLIP):
        def training_step(self, batch: CaptionBatch, batch_idx: int) -> torch.Tensor:
            image, text = self(batch)
            return ((image - text) ** 2).sum()

    module = Pull(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
    before = module.model.visual.proj.detach().clone()
    options: dict[str, Any] = {"gradient_clip_val": 1.0, "callbacks": callbacks.defaults()}
    trainer(tmp_path, max_steps=2, limit_val_batches=0, **options).fit(module, data_for(module, caption_table))
    assert not torch.equal(module.model.visual.proj, before)


# A batch moves to its device without a look at its texts.


def batch() -> CaptionBatch:
    images, tokens = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 5, dtype=torch.long)
    return CaptionBatch(images, tokens, ["a", "b"], ["x", "y"], lengths=[3, 4], negative_tokens=tokens[:1])


class Moves(TorchFunctionMode):
    """Record what is moved or pinned and how, and leave it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.pin_memory):
            self.seen.append((func.__name__, *args[1:], kwargs or {}))
            return args[0]
        return func(*args, **(kwargs or {}))


def test_lightning_moves_the_tensors_and_nothing_else() -> None:
    whole = batch()
    moved = move_data_to_device(whole, torch.device("meta"))
    assert isinstance(moved, CaptionBatch)
    for name, before, after in zip(whole._fields, whole, moved, strict=True):
        if isinstance(before, Tensor):
            assert isinstance(after, Tensor)
            assert after.device.type == "meta"
        else:
            assert after is before, name


def test_copies_to_cuda_are_not_waited_for_and_those_to_other_devices_are() -> None:
    for device in ("cuda", "mps", "cpu"):
        with Moves() as moves:
            batch().to(device)
        assert moves.seen == [("to", device, {"non_blocking": device == "cuda"})] * 3


def test_a_data_loader_pins_the_tensors_and_nothing_else() -> None:
    whole = batch()
    with Moves() as moves:
        pinned = pin_memory(whole)
    assert moves.seen == [("pin_memory", {})] * 3
    assert all(after is before for before, after in zip(whole, pinned, strict=True))


def test_an_image_whose_feature_is_not_a_number_spoils_its_own_thing_alone() -> None:
    things = batch()._replace(image_of=torch.tensor([[0, 1], [2, -1], [3, -1]]))
    rows = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = torch.stack([torch.nn.functional.normalize(rows[0] + rows[1], dim=0), rows[2], rows[3]])
    rows[3] = torch.nan
    rows.requires_grad_()
    found = things.of_pairs(rows)
    assert torch.allclose(found[:2], expected[:2])
    assert found[2].isnan().all()
    found[:2].sum().backward()
    assert rows.grad is not None
    assert rows.grad[:3].isfinite().all()


def test_what_a_source_adds_goes_where_the_images_go() -> None:
    whole = batch()._replace(negative_tokens=None, extra={"weight": torch.tensor([3.0, 5.0])})
    assert whole.to("meta").extra["weight"].device.type == "meta"
    parts = whole.stretched(4).split(2)
    assert [part.extra["weight"].tolist() for part in parts] == [[3.0, 5.0], [5.0, 5.0]]
