"""Two objects are enough in Python: a data module takes preprocessing and tokenizer from the module it feeds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from datamodules import CaptionDataModule, Captions, NoCaptions, OpenMoji
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def small(size: int, context_length: int, **options: Any) -> CLIPConfig:
    return CLIPConfig(
        embed_dim=16,
        image=VisionTransformerConfig(image_size=size, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=context_length, width=64, layers=1, heads=1),
        **options,
    )


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten JPEGs and a table of their captions in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(f"{i}.jpg")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,photo {i}\n" for i in range(10)))


@pytest.mark.usefixtures("photos")
def test_a_model_and_a_table_are_all_that_fit_needs() -> None:
    """The trainer's own defaults, its distributed sampler among them, are right for one process."""
    module, data = LitCLIP("ViT-tiny-16-64"), Captions("captions.csv", batch_size=9, num_workers=0)
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.warns(UserWarning, match=r"pass Trainer\(callbacks=callbacks.defaults\(\)\)"):
        trainer.fit(module, data)
    assert trainer.global_step == 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()


class _Shapes(LightningModule):
    """Records the shapes of the batches of every stage; asks for images of 24 pixels."""

    def __init__(self, wrapped: LitCLIP) -> None:
        super().__init__()
        self.preprocessing, self.tokenize = wrapped.preprocessing, wrapped.tokenize
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, tuple[int, int]] = {}

    def _see(self, stage: str, batch: Any) -> torch.Tensor:
        self.seen[stage] = batch.images.shape[-1], max(batch.lengths)
        return self.weight * 1

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self._see("fit", batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self._see("validate", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._see("test", batch)

    def predict_step(self, batch: Any, _: int) -> None:
        self._see("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _own(drawings_cache: Path) -> CaptionDataModule:
    return OpenMoji(batch_size=50, num_workers=0, cache_dir=str(drawings_cache))


def _table(_: Path) -> CaptionDataModule:
    return Captions("captions.csv", "captions.csv", batch_size=5, num_workers=0)


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("make", [_table, _own])
def test_every_stage_reads_images_and_texts_as_its_own_module_wants_them(make: Any, drawings_cache: Path) -> None:
    """Also when one data module feeds a second module of another size."""
    data = make(drawings_cache)
    for size, context in ((32, 4), (48, 3)):
        module = _Shapes(LitCLIP(small(size, context)))
        options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **QUIET}
        for stage in ("validate", "fit", "test", "predict"):
            getattr(Trainer(max_steps=1, limit_val_batches=1, **options), stage)(module, data)
        assert module.seen == dict.fromkeys(("validate", "fit", "test", "predict"), (size, context))


@pytest.mark.usefixtures("photos")
def test_a_subclass_of_the_module_decides_how_images_are_preprocessed() -> None:
    class Bilinear(LitCLIP):
        @property
        def preprocessing(self) -> Preprocessing:
            return Preprocessing(32, interpolation="bilinear", resize_mode="squash")

    data = Captions(val="captions.csv", num_workers=0)
    Trainer(logger=False, **QUIET).validate(Bilinear(small(32, 8)), data, verbose=False)
    (batch,) = data.val_dataloader()
    with Image.open("0.jpg") as image:
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)


def test_loader_is_empty_and_has_no_length() -> None:
    loader = NoCaptions().val_dataloader()
    assert list(loader) == []
    with pytest.raises(TypeError):  # a length of 0 would make Lightning skip the epoch with its hooks
        len(loader)
