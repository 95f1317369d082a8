"""The contrastive loss over places; value and gradients on any ranks: ``tests/losses/test_loss.py``."""

import dataclasses
from typing import Any

import pytest
import torch

import lit_clip.training.losses
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Loss, Sum
from lit_clip.losses.contrastive import unit
from lit_clip.models.config import Preprocessing, ResNetConfig
from lit_clip.models.external_config import CustomImageConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.training.losses import EncodesAgain, PlaceContrastive, place_similarities
from tests.helpers.own_encoders import Image
from tests.helpers.ranks import CONFIG, PAIRS, make_batch, make_module
from tests.losses.test_tiled import Largest


def with_places() -> Loss:
    return Sum([Contrastive(), PlaceContrastive()], [1.0, 0.5])


def test_help_offers_no_part_of_a_loss_as_a_loss() -> None:
    assert PlaceContrastive in Loss.__subclasses__()
    assert EncodesAgain not in Loss.__subclasses__()


def test_blocks_of_images_have_the_value_and_gradients_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    features = [unit(torch.randn(*shape, 5, generator=generator).double()) for shape in ((7, 4), (9,))]
    results = []
    for most in (2**24, 2 * 4 * 9):
        monkeypatch.setattr(lit_clip.training.losses, "COSINES", most)
        leaves = [x.clone().requires_grad_() for x in features]
        with Largest() as largest:
            similarities = place_similarities(*leaves)
            results.append([similarities, *torch.autograd.grad(similarities.square().sum(), leaves)])
    assert largest.elements <= max(2 * 4 * 9, 7 * 4 * 5)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_a_soft_maximum_lies_between_the_mean_and_the_highest_cosine() -> None:
    text = torch.eye(2).double()
    places = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.6, 0.8]]]).double()
    found = place_similarities(places, text)
    assert found[0].tolist() == pytest.approx([1 - 0.0346574] * 2, abs=1e-6)  # 1 - log(2) / 20
    assert found[1].tolist() == pytest.approx([0.6, 0.8], abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_batch_norm_counts_each_image_once(micro_batch_size: int | None) -> None:
    config = dataclasses.replace(
        CONFIG, image=ResNetConfig((1, 1, 1, 1), 8, 32), preprocessing=Preprocessing(image_size=32)
    )
    buffers = []
    for loss in (Contrastive(), with_places()):
        module = make_module(architecture=config, loss=loss, micro_batch_size=micro_batch_size)
        module.loss.prepare(module.model)
        module.train()
        module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
        buffers.append(dict(module.model.named_buffers()))
    assert any(name.endswith("running_var") for name in buffers[0])
    for name, expected in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], expected, rtol=0, atol=0)


def test_it_is_described_and_in_no_checkpoint() -> None:
    module = make_module(loss=with_places())
    alone = {name for name, _ in make_module(loss=Contrastive()).named_parameters()}
    module.loss.prepare(module.model)
    assert {name for name, _ in module.named_parameters()} == alone
    described = module.loss.describe()["init_args"]["terms"][1]
    assert described["class_path"] == "lit_clip.training.losses.PlaceContrastive"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": Freeze(image="all")}, "PlaceContrastive trains the image encoder, which is frozen; leave one"),
        ({"architecture": "without"}, "PlaceContrastive needs features of places; encode_patches: .*; add one"),
    ],
)
def test_a_model_that_it_cannot_train_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    if options.get("architecture") == "without":
        image = CustomImageConfig(Image)
        options = {"architecture": dataclasses.replace(CONFIG, image=image)}
    module = make_module(loss=with_places(), **options)
    with pytest.raises(InputError, match=f"^model.loss: {message}") as refusal:
        module.loss.prepare(module.model)
    assert "\n" not in str(refusal.value)
