"""``model.encode`` and ``model.similarity``: texts, images and files in any mixture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_clip import CLIP, LitCLIP, create_model
from lit_clip.errors import BadSample, InputError
from lit_clip.models.finetuning import Freeze


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return create_model("ViT-tiny-16-64")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("dog.png", "grey.JPG", "two words.webp")]
    for path in paths:
        image = Image.fromarray(noise.integers(0, 256, (70, 90, 3), dtype=np.uint8))
        (image.convert("L") if path.stem == "grey" else image).save(path)
    return paths


def text_by_hand(model: CLIP, text: str) -> Tensor:
    return F.normalize(model.encode_text(model.tokenize(text))[0].detach(), dim=0)


def image_by_hand(model: CLIP, path: Path) -> Tensor:
    return F.normalize(model.encode_image(model.preprocess(Image.open(path))[None])[0].detach(), dim=0)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_mixed_list_has_the_features_of_each_item_in_its_order(
    model: CLIP, photos: list[Path], batch_size: int
) -> None:
    items = ["a dog", Image.open(photos[0]), "dog.png", photos[1], "very " * 90 + "long", "two words.webp", ""]
    features = model.encode(items, batch_size)
    image, grey, third = (image_by_hand(model, path) for path in photos)
    texts = [text_by_hand(model, str(items[i])) for i in (0, 4, 6)]
    expected = torch.stack([texts[0], image, image, grey, texts[1], third, texts[2]])
    assert (features.dtype, features.device.type, features.requires_grad) == (torch.float32, "cpu", False)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_a_single_item_has_one_row_and_no_item_has_none(model: CLIP, photos: list[Path]) -> None:
    torch.testing.assert_close(model.encode("a dog"), text_by_hand(model, "a dog"), atol=1e-5, rtol=1e-4)
    assert model.encode(photos[0]).shape == model.encode(Image.open(photos[0])).shape == (256,)
    assert model.encode([]).shape == (0, 256)


def test_a_string_that_is_no_file_is_a_text_and_a_path_is_always_a_file(model: CLIP, photos: list[Path]) -> None:
    with pytest.warns(UserWarning, match=r"'cat\.png' is no file here and is encoded as a text"):
        feature = model.encode("cat.png")
    torch.testing.assert_close(feature, text_by_hand(model, "cat.png"), atol=1e-5, rtol=1e-4)
    Path("notes.txt").write_text("a text file is no image", encoding="utf-8")
    torch.testing.assert_close(model.encode("notes.txt"), text_by_hand(model, "notes.txt"), atol=1e-5, rtol=1e-4)
    for path in (Path("cat.png"), Path("notes.txt")):
        with pytest.raises(BadSample, match=str(path)):
            model.encode(["a", path])
    Path("broken.png").write_bytes(b"nothing")
    with pytest.raises(BadSample, match=r"broken\.png"):
        model.encode("broken.png")


@pytest.mark.parametrize("call", [CLIP.encode, lambda model, items: model.similarity(items, "a cat")])
def test_the_warning_shows_the_line_that_called(call: Callable[[CLIP, list[str]], Tensor], model: CLIP) -> None:
    with pytest.warns(UserWarning, match=r"'cat\.png' is no file here") as caught:
        call(model, ["cat.png"])
    assert caught[0].filename == __file__


def test_other_items_are_refused(model: CLIP) -> None:
    with pytest.raises(
        InputError, match="encode: item 1 is a numpy.ndarray; it must be a text, a PIL image or the path"
    ):
        model.encode(["a", np.zeros((8, 8, 3))])  # type: ignore[list-item]
    with pytest.raises(InputError, match="batch_size: 0 must be at least 1"):
        model.encode("a", batch_size=0)


def test_modes_are_left_as_they_were_also_after_an_error(photos: list[Path]) -> None:
    module = LitCLIP("ViT-tiny-16-64", freeze=Freeze(image="all"))
    modes = [each.training for each in module.model.modules()]
    assert len(set(modes)) == 2
    module.model.encode(["a dog", photos[0]])
    with pytest.raises(BadSample):
        module.model.encode(Path("gone.png"))
    assert [each.training for each in module.model.modules()] == modes


def test_a_model_in_half_precision_gives_float32(photos: list[Path]) -> None:
    half = create_model("ViT-tiny-16-64").bfloat16()
    features = half.encode(["a dog", photos[0]])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, half.float().encode(["a dog", photos[0]]), atol=0.02, rtol=0.1)


def test_similarity_takes_items_or_features_of_any_length(model: CLIP, photos: list[Path]) -> None:
    a, b = ["a dog", "a cat"], [*photos]
    expected = (
        torch.stack([text_by_hand(model, text) for text in a])
        @ torch.stack([image_by_hand(model, path) for path in b]).mT
    )
    torch.testing.assert_close(model.similarity(a, b), expected, atol=1e-5, rtol=1e-4)
    longer = model.encode(b).double() * 7
    torch.testing.assert_close(model.similarity(a, longer.numpy()), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.similarity("a dog", longer[1]), expected[:1, 1:2], atol=1e-5, rtol=1e-4)
    assert model.similarity(a, []).shape == (2, 0)
    with pytest.raises(InputError, match=r"features are \[3, 5\], this model's are \[N, 256\]"):
        model.similarity(a, torch.zeros(3, 5))
