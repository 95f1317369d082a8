"""Steps with several captions an image, or images a thing: a plain loop, repeated images, and what is encoded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.losses import Alignment, Contrastive, Loss, Matryoshka, Sigmoid, Sum, WeightedContrastive
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import RetrievalSet
from lit_clip.training.losses import PlaceContrastive
from lit_clip.training.teacher import Distillation
from tests.helpers.ranks import CONFIG, PAIRS, make_module
from tests.helpers.ranks_together import (
    CAPTIONS,
    CASES,
    IMAGES,
    MEAN_COUNTS,
    THING_COUNTS,
    THING_LOSSES,
    THING_SIZES,
    batch_of,
    table_of,
)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("several", ["captions", "things", "means"])
def test_value_and_gradients_equal_a_plain_loop(
    several: str, world: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Over images and their captions, things with their images and texts, or means of the images of things."""
    table = [table_of(tmp_path)] if several == "things" else []
    ranks(several, world, str(tmp_path / "errors.json"), *table, script="ranks_together.py")
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    cases = {
        "captions": 2 * len(IMAGES[world]) * len(CASES),
        "things": len(THING_LOSSES) * len(THING_COUNTS[world]) * len(THING_SIZES),
        "means": len(MEAN_COUNTS[world]) * len(THING_SIZES),
    }
    assert len(errors) == cases[several]
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda item: -item[1])[:5]


LOSSES: dict[str, Callable[[], Loss]] = {
    "ignored": lambda: Contrastive("ignored"),
    "weighted": lambda: WeightedContrastive("positives"),
    "Matryoshka": lambda: Matryoshka(Contrastive("positives"), [8, 16]),
    "teacher": lambda: Sum([Contrastive("positives"), Distillation(), Distillation(of="features"), Alignment()]),
    "places": lambda: Sum([Contrastive("positives"), PlaceContrastive()]),
}


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_equals_that_of_a_batch_that_repeats_the_images(loss: str, size: int | None) -> None:
    batch = batch_of(slice(0, PAIRS))
    batch = batch._replace(extra={"weight": torch.linspace(0, 2, batch.pairs)})
    repeated = batch._replace(images=batch.of_pairs(batch.images), image_of=None)
    found = []
    for each in (batch, repeated):
        module = make_module(loss=LOSSES[loss](), micro_batch_size=size)
        module.loss.prepare(module.model)
        with torch.no_grad():
            module.model.logit_scale.add_(0.1)  # a teacher's features are no longer the model's
            for parameter in module.model.parameters():
                parameter *= 1.05
        value = module.training_step(each, 0)
        value.backward()
        assert module.last_step is not None
        assert (module.last_step.keys, module.last_step.pairs) == (batch.keys, sum(CAPTIONS))
        found.append([value.detach(), *(p.grad for p in module.model.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [None, 1, 6, 29])
def test_each_image_is_encoded_once_and_no_more_texts_at_once_than_the_micro_batch_has(size: int | None) -> None:
    module, batch = make_module(loss=Contrastive("positives"), micro_batch_size=size), batch_of(slice(0, 6))
    seen: dict[str, list[int]] = {"images": [], "texts": []}
    model: Any = module.model
    model.visual.register_forward_hook(lambda layer, inputs, _: seen["images"].append(len(inputs[0])))
    encode = model.encode_text
    model.encode_text = lambda tokens, **options: seen["texts"].append(len(tokens)) or encode(tokens, **options)
    with torch.no_grad():
        module.training_step(batch, 0)
    parts = -(-batch.pairs // (size or batch.pairs))
    assert sum(seen["texts"]) == batch.pairs
    assert sum(seen["images"]) == max(6, parts)  # repeated only where there are more parts than images
    assert max(*seen["texts"], *seen["images"]) <= (size or batch.pairs)


def test_validation_encodes_an_image_of_several_pairs_once() -> None:
    module, together = make_module().eval(), batch_of(slice(0, 6))
    assert together.image_of is not None
    repeated = together._replace(images=together.of_pairs(together.images), image_of=None)
    expected = module.model.encode_image(module.model.normalize(repeated.images), normalize=True)
    seen: list[int] = []
    module.model.visual.register_forward_hook(lambda layer, inputs, _: seen.append(len(inputs[0])))
    module._validated = RetrievalSet()  # as an epoch of validation begins
    with torch.no_grad():
        features = module.validation_step(repeated, 0)
    assert seen == [6]
    torch.testing.assert_close(features["image"], expected)


@pytest.mark.parametrize("loss", [None, Sum([Alignment(), Contrastive()]), Matryoshka(Sigmoid(), [8])])
def test_a_loss_in_which_captions_of_an_image_are_wrong_for_it_is_refused(loss: Loss | None) -> None:
    module = LitCLIP(CONFIG, loss=loss)
    data = type("Data", (), {"captions": type("Options", (), {"per_image": "together"})})
    trainer = {"accumulate_grad_batches": 1, "precision": "32-true", "callbacks": (), "datamodule": data()}
    module._trainer = type("Trainer", (), trainer)()  # pyright: ignore
    with pytest.raises(InputError, match=r"^model\.loss\.duplicates: negatives of .*; set it to positives$"):
        module.on_fit_start()
