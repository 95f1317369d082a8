"""transformers opens an exported folder with the model's features, pixels and ids."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import tokenizers
import torch
import transformers

from lit_clip.commands.export import export
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.models.tokenizer import tokenize
from lit_clip.weights.hugging_face import read_hugging_face_folder
from lit_clip.weights.load import load_model
from tests.helpers.exports import TEXTS, assert_identical, checkpoint, photos, variants

pytestmark = pytest.mark.usefixtures("offline")


Exported = Callable[[str], tuple[CLIP, Path]]


@pytest.fixture(scope="module")
def folders() -> dict[str, tuple[CLIP, Path]]:
    """Return the exports by the name of their variant, filled on first use."""
    return {}


@pytest.fixture
def exported(
    folders: dict[str, tuple[CLIP, Path]], tiny_config: CLIPConfig, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Return a function from a variant's name to a model and the folder of its export, to be read only."""

    def make(kind: str) -> tuple[CLIP, Path]:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            ours = checkpoint(variants(tiny_config)[kind], folder / "last.ckpt")
            export(str(folder / "last.ckpt"), format="hugging_face", output=str(folder / "out"))
            folders[kind] = ours, folder / "out"
        return folders[kind]

    return make


@pytest.mark.parametrize(
    "kind", ["vit", *(pytest.param(each, marks=pytest.mark.slow) for each in ("quick_gelu", "gelu_tanh"))]
)
def test_transformers_opens_the_folder_with_our_features_pixels_and_ids(exported: Exported, kind: str) -> None:
    ours, folder = exported(kind)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    sizes = ((70, 90), (90, 70), (33, 36))  # with margins that both sides halve the same way
    for backend, levels in (("pil", 0.001), (None, 2.001)):
        processor = transformers.CLIPProcessor.from_pretrained(folder, backend=backend)
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=TEXTS, images=photos(*sizes), **options)
        images = torch.stack([ours.preprocess(image) for image in photos(*sizes)])
        std = torch.tensor(ours.preprocessing.std)[:, None, None]
        assert ((inputs["pixel_values"] - images) * std).abs().max() * 255 <= levels
    assert torch.equal(inputs["input_ids"] * inputs["attention_mask"], ours.tokenize(TEXTS))
    inputs["pixel_values"] = images
    with torch.no_grad():
        out = theirs(**inputs)
        tokens = ours.tokenize(TEXTS)
        torch.testing.assert_close(out.image_embeds, ours.encode_image(images, normalize=True), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.text_embeds, ours.encode_text(tokens, normalize=True), rtol=0, atol=1e-5)


def test_the_crop_of_transformers_is_one_pixel_off_for_the_sizes_in_the_card(exported: Exported) -> None:
    ours, folder = exported("vit")
    assert "3, 7, 11, ... pixels longer" in (folder / "README.md").read_text()
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    (image,) = photos((32, 35))
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs[:, :, 1:], ours.preprocess(image)[:, :, :-1], rtol=0, atol=1e-5)


def test_converting_to_hugging_face_and_back_and_to_open_clip_is_bit_exact(
    tmp_path: Path, tiny_config: CLIPConfig, exported: Exported
) -> None:
    ours, folder = exported("vit")
    config, state = read_hugging_face_folder(folder)
    assert config == tiny_config
    assert_identical(state, ours.state_dict())
    export(str(folder), format="open_clip", output=str(tmp_path / "oc"))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert_identical(ours.state_dict(), load_model(tmp_path / "oc").state_dict())


# Texts whose cleaning transformers does not do: HTML escapes, broken Unicode, ligatures, typographic quotes.
UNCLEANED = ["&amp;lt;b&amp;gt; bold", "schÃ¶n", "ﬁne ﬂour", "“curly” ‘quotes’"]
CLEAN = [
    "a diagram",
    "a photo of a cat.",
    "A Photo of a CAT!",
    "  multiple   spaces\tand\nnewlines ",
    "it's the dog's bone, they'll've",
    "café naïve",
    "cafe\u0301",
    "12345 3.14",
    "emoji 😀🚀",
    "中文 日本語",
    "<|startoftext|> x <|endoftext|>",
    "",
    'a photo of the number: "7".',
    "hello-world_foo",
]


def test_the_exported_tokenizer_gives_our_ids_for_texts_that_need_no_fixing(exported: Exported) -> None:
    _, folder = exported("vit")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    assert tokenizer.model_max_length == 16

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenize(text)[0] if i]

    assert [text for text in CLEAN if tokenizer(text)["input_ids"] != ids(text)] == []
    assert [text for text in UNCLEANED if tokenizer(text)["input_ids"] == ids(text)] == []
    from_parts = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert json.loads((folder / "vocab.json").read_text()) == from_parts
    merges = (folder / "merges.txt").read_text().splitlines()
    assert (len(merges), merges[1]) == (48894 + 1, "i n")
