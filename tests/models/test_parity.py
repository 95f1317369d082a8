"""Models of open_clip's registry: open_clip's features, gradients, pixels and ids, and all that trains them.

The weights are random, the sizes tiny.
"""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from benchmarks.families.families import FAMILIES, TEXTS, compare, photos, small
from benchmarks.families.page import REGISTRY, listing, registry, verdicts
from lit_clip.errors import InputError
from lit_clip.models.config import described
from lit_clip.models.finetuning import Freeze, UnlockLast, frozen_names
from lit_clip.models.frozen_prefix import frozen_activations, image_features_from, text_features_from, use_frozen_prefix
from lit_clip.models.layers import TOWERS, layer_groups
from lit_clip.models.lora import LoRA, add_lora, merge_lora
from lit_clip.models.rates import Rates, rated_layers
from lit_clip.module import LitCLIP
from lit_clip.weights.export import (
    ExportSample,
    parity_of,
    read_onnx,
    read_open_clip,
    write_hugging_face,
    write_onnx,
    write_open_clip,
)
from lit_clip.weights.load import load_model
from tests.test_module import data_for, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_open_clip", "_offline"),
    pytest.mark.filterwarnings("ignore:.*caption decoder"),
]
FASTVIT = pytest.param("MobileCLIP-S, MobileCLIP2-S", marks=pytest.mark.slow)
NEW = ["CLIPA", "MetaCLIP 2 worldwide", "CoCa", "MobileCLIP2-L"]
SLOW = ["MobileCLIP-B", "PE-Core", "ViTamin", "EVA"]


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return folders of published models by family, filled on first use, with open_clip's models."""
    return {}


@pytest.fixture
def made(folders: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family to its folder and open_clip's model of it."""

    def make(family: str) -> tuple[Path, Any]:
        if family not in folders:
            folder = tmp_path_factory.mktemp("published")
            folders[family] = folder, small(folder, FAMILIES[family])
        return folders[family]

    return make


@pytest.mark.parametrize("family", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in FAMILIES])
def test_features_pixels_and_ids_are_open_clips(made: Any, family: str) -> None:
    folder, theirs = made(family)
    parity = compare(folder, theirs, load_model(folder))
    assert parity.tokens
    assert max(parity.image, parity.text) < 1e-4
    assert parity.pixels < 1e-3


@pytest.mark.parametrize("family", [*list(FAMILIES)[:2], *NEW, FASTVIT])
def test_every_gradient_is_open_clips(made: Any, family: str) -> None:
    folder, theirs = made(family)
    ours = load_model(folder)
    images, tokens = photos(2, ours.visual.image_size), ours.tokenize(TEXTS)
    for model in (theirs, ours):
        model.zero_grad()
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        (image @ text.T).square().sum().backward()
    expected = {name.removeprefix("text."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = expected[name.removeprefix("text.")]
        if gradient is None or name == "logit_scale":
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", [*NEW, FASTVIT])
@torch.no_grad()
def test_texts_may_be_trimmed_to_the_columns_that_their_features_depend_on(made: Any, family: str) -> None:
    model = load_model(made(family)[0])
    tokens = model.tokenize([text for text in TEXTS if len(text) < 100])
    whole = model.encode_text(tokens)
    lengths = model.tokenizer.lengths(tokens)
    trimmed = model.tokenizer.trim(tokens)
    torch.testing.assert_close(model.encode_text(trimmed), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode_text(trimmed, lengths=lengths), whole, rtol=1e-5, atol=1e-5)
    kinds = {"CLIPA": 32, "MobileCLIP-S, MobileCLIP2-S": 77, "MobileCLIP2-L": 77}  # their padding is read
    assert trimmed.shape[1] == kinds.get(family, trimmed.shape[1])
    assert family in kinds or trimmed.shape[1] < tokens.shape[1]


def test_cocas_text_encoder_reads_one_token_of_padding_and_a_full_text_whole(made: Any) -> None:
    folder, theirs = made("CoCa")
    ours = load_model(folder)
    tokens = ours.tokenize([" ".join(["dog"] * count) for count in (2, 72, 73, 74, 75)])
    tokens[0, 1] = 0  # an id of the vocabulary that is also that of padding
    with torch.no_grad():
        expected = theirs.encode_text(tokens, normalize=False)
        torch.testing.assert_close(ours.encode_text(tokens), expected, rtol=0, atol=1e-5)
        for columns in (4, 5, 9):  # the text has four tokens
            torch.testing.assert_close(ours.encode_text(tokens[:1, :columns]), expected[:1], rtol=0, atol=1e-5)


def test_cocas_caption_decoder_is_left_out_with_a_line_that_says_so(made: Any) -> None:
    with pytest.warns(UserWarning, match=r"caption decoder \(\d+\.\d million weights\) is left out") as caught:
        model = load_model(made("CoCa")[0])
    assert len(caught) == 1
    assert not any("decoder" in name for name in model.state_dict())


@pytest.mark.parametrize("family", [*NEW, FASTVIT])
def test_layers_freeze_decay_and_get_additions(made: Any, family: str) -> None:
    model = load_model(made(family)[0])
    for tower in TOWERS:
        groups = [group.name for group in layer_groups(model, tower)]
        assert groups[0] == "embeddings"
        assert groups[-1] == "head"
    assert [group.name for group in layer_groups(model, "text")] == ["embeddings", "blocks.0", "blocks.1", "head"]
    rates = {layer.name: layer.rate.lr for layer in rated_layers(model, Rates(layer_decay=0.5))}
    assert (rates["text.head"], rates["text.blocks.1"], rates["text.embeddings"]) == (1, 0.5, 0.125)
    frozen = frozen_names(model, Freeze(UnlockLast(1), UnlockLast(0)))
    prefix = "" if model.config.papers_layout else "text."
    assert f"{prefix}transformer.resblocks.1.mlp.c_fc.weight" in frozen
    assert not any("attn_pool" in name or "text_projection" in name or "ln_post" in name for name in frozen)
    assert ("text.cls_emb" in frozen) == (family == "CoCa")
    images, tokens = photos(2, model.visual.image_size), model.tokenize(TEXTS)
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(tokens)
        add_lora(model, LoRA(r=2))
        actual = model.encode_image(images), model.encode_text(tokens)
        merge_lora(model)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["CLIPA", "CoCa", "MetaCLIP 2 worldwide", "MobileCLIP2-L"])
@pytest.mark.parametrize("unlocked", [0, 1])
@torch.no_grad()
def test_stored_activations_of_frozen_layers_give_the_same_features(made: Any, family: str, unlocked: int) -> None:
    model = load_model(made(family)[0])
    for name in frozen_names(model, Freeze(UnlockLast(unlocked), UnlockLast(unlocked))):
        model.get_parameter(name).requires_grad_(False)
    for tower in TOWERS:
        prefix = use_frozen_prefix(model, tower)
        assert prefix is not None
        model.frozen_prefixes[tower] = prefix
    tokens = model.tokenize(["a dog", "two green birds in rain", "a cat"])
    lengths = model.tokenizer.lengths(tokens).tolist()
    stored = [
        frozen_activations(model, model.frozen_prefixes["text"], tokens[i : i + 1, :n], [n])[0]
        for i, n in enumerate(lengths)
    ]
    if stored[0].ndim == 2:  # every token: padded to the longest text's
        most = max(len(each) for each in stored)
        stored = [torch.cat([each, each.new_full((most - len(each), each.shape[1]), 7.0)]) for each in stored]
    trimmed = model.tokenizer.trim(tokens)
    features = text_features_from(model, torch.stack(stored), trimmed, lengths)
    torch.testing.assert_close(features, model.encode_text(tokens), rtol=1e-4, atol=1e-5)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    activations = frozen_activations(model, model.frozen_prefixes["image"], images)
    expected = model.encode_image(model.normalize(images))
    torch.testing.assert_close(image_features_from(model, activations), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["CLIPA", "CoCa"])
def test_patch_dropout_keeps_what_is_read_and_trains(made: Any, family: str) -> None:
    """Dropped are patches, never the class token; the mean is that of the patches that are kept."""
    model: Any = load_model(made(family)[0]).train()
    images = photos(2, model.visual.image_size)
    whole = model.encode_image(images)
    model.visual.patch_dropout = 0.5
    sizes: list[int] = []
    model.visual.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    some = model.encode_image(images)
    assert sizes == [2 * (1 + 4)]  # of 9 patches, and the class token
    assert some.shape == whole.shape
    assert not torch.allclose(some, whole)
    some.sum().backward()
    gradient = model.visual.class_embedding.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("family", [*(pytest.param(name, marks=pytest.mark.slow) for name in NEW), FASTVIT])
def test_open_clip_reads_an_export_with_the_same_features(made: Any, family: str, tmp_path: Path) -> None:
    model = load_model(made(family)[0])
    sample = ExportSample.of(model)
    write_open_clip(model, tmp_path)
    parity = parity_of(model, sample, read_open_clip(tmp_path, sample))
    assert max(parity.image, parity.text) < 1e-4
    assert parity.tokens
    assert parity.pixels is not None
    assert parity.pixels < 1
    again = load_model(tmp_path)
    if family != "MobileCLIP2-L":  # open_clip's format has no drop_path for its exports
        assert described(again.config) == described(model.config)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", [*NEW, FASTVIT])
def test_onnx_gives_the_same_features(made: Any, family: str, tmp_path: Path) -> None:
    model = load_model(made(family)[0])
    sample = ExportSample.of(model)
    write_onnx(model, tmp_path)
    parity = parity_of(model, sample, read_onnx(tmp_path, sample))
    assert max(parity.image, parity.text) < 1e-4


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("CLIPA", "a CLIPModel has image.pool class, this model mean"),
        ("MetaCLIP 2 worldwide", "a CLIPModel has text.pool argmax, this model eos"),
        ("CoCa", "a CLIPModel has image.pool class, this model attention"),
        ("MobileCLIP2-L", "a SiglipModel has image.projection none, this model classifier"),
    ],
)
def test_hugging_faces_format_is_refused_with_the_reason(made: Any, family: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        write_hugging_face(load_model(made(family)[0]), tmp_path)


def test_the_list_of_the_registry_is_current() -> None:
    """The page is current, and every published weight is listed with what lit-clip says to it."""
    models = verdicts()
    text = registry(models)
    assert REGISTRY.read_text(encoding="utf-8") == text, "run python -m benchmarks.families.page"
    rows = listing(models).splitlines()
    listed = dict(line.strip("| ").split(" | ")[:2] for line in rows if line.startswith("| "))
    assert all(tag in listed[name].split(", ") for name, tag in open_clip.list_pretrained())
    assert "196 open, 0 are refused" in text or open_clip.__version__ != "3.3.0"


@pytest.mark.parametrize(
    ("family", "options"), [("CLIPA", {}), ("MetaCLIP 2 worldwide", {}), ("CoCa", {"lora": LoRA(r=2)})]
)
def test_fine_tuning_writes_a_checkpoint_that_opens_with_the_same_features_and_ids(
    made: Any, family: str, options: dict[str, Any], caption_table: Path, tmp_path: Path
) -> None:
    freeze = Freeze(UnlockLast(1), UnlockLast(1))
    module = LitCLIP(pretrained=made(family)[0], freeze=freeze, **options)
    before = copy.deepcopy(module.model.state_dict())
    fitting = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    fitting.fit(module, data_for(module, caption_table, batch_size=8))
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    blocks = {name.partition("resblocks.")[2][:1] for name in changed if "resblocks" in name}
    assert blocks == {"1"}
    assert ("text.cls_emb" in changed) is False
    fitting.save_checkpoint(tmp_path / "model.ckpt")
    again, model = load_model(tmp_path / "model.ckpt"), module.model.eval()
    images = photos(2, model.visual.image_size)
    assert torch.equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    with torch.no_grad():
        for encode, inputs in (("encode_image", images), ("encode_text", model.tokenize(TEXTS))):
            expected = getattr(model, encode)(inputs)
            torch.testing.assert_close(getattr(again, encode)(inputs), expected, rtol=1e-4, atol=1e-5)
