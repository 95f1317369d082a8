"""load_model opens every supported source with the source's features, and refuses the rest in one line."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import lit_clip
from lit_clip import LitCLIP, create_model, load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.tokenizer import tokenize
from lit_clip.weights import load
from lit_clip.weights.hub import OPEN_CLIP_WEIGHTS
from tests.conftest import openai_code

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
CONFIG = CLIPConfig(
    embed_dim=32,
    image=VisionTransformerConfig(image_size=64, patch_size=16, width=64, layers=2, heads=1),
    text=TextTransformerConfig(context_length=16, width=64, layers=2, heads=1),
    activation="quick_gelu",
)
RESNET = CLIPConfig(32, ResNetConfig((1, 2, 1, 1), width=16, image_size=64), CONFIG.text, "quick_gelu")
KINDS = pytest.mark.parametrize("config", [CONFIG, RESNET], ids=["ViT", "ResNet"])


def random_model(config: CLIPConfig = CONFIG) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.uniform_(0.2, 0.6)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # statistics of real activations: with others all images have the same features
        if norms:
            model.visual(F.interpolate(torch.randn(4, 3, 5, 5), (64, 64)))
    return model.eval()


@torch.no_grad()
def features(model: Any, size: int = 64) -> tuple[Tensor, Tensor]:
    """Unit features of two images and two texts, float32."""
    images = F.interpolate(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)), (size, size))
    texts = tokenize(["a dog", "a long caption about a cat"], 16)
    image, text = model.encode_image(images), model.encode_text(texts)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def assert_same(loaded: CLIP, source: Any, tolerance: float = 1e-5) -> None:
    assert not loaded.training
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert all(tensor.requires_grad for tensor in loaded.parameters())
    for ours, theirs in zip(features(loaded), features(source), strict=True):
        assert float((theirs[0] - theirs[1]).abs().max()) > 10 * tolerance  # two inputs, two features
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def refusal(source: Any, **options: Any) -> str:
    """Return the one-line error of ``load_model``."""
    with pytest.raises(InputError) as caught:
        load_model(source, **options)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


# OpenAI's own ---------------------------------------------------------------------------------------------------------


def openai_model(config: CLIPConfig) -> Any:
    """OpenAI's own model with half-precision weights, computing in float32; sizes are buffers as in its archives."""
    theirs = openai_code().build_model({**random_model(config).state_dict()}).half().float()
    for name, value in {"input_resolution": 64, "context_length": 16, "vocab_size": 49408}.items():
        if hasattr(theirs, name):
            delattr(theirs, name)
        theirs.register_buffer(name, torch.tensor(value))
    return theirs


def save_archive(model: Any, path: Path) -> Path:
    """Trace and save in half precision, as OpenAI did."""
    inputs = torch.zeros(1, 3, 64, 64), tokenize("a dog", 16)
    traced = torch.jit.trace_module(model, {"encode_image": inputs[0], "encode_text": inputs[1], "forward": inputs})
    torch.jit.save(traced.half(), str(path))
    return path


@KINDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openais_archive_needs_no_architecture_and_gives_its_features(tmp_path: Path, config: CLIPConfig) -> None:
    theirs = openai_model(config)
    path = save_archive(theirs, tmp_path / "model.pt")
    loaded = load_model(path)
    assert loaded.config == config
    assert_same(loaded, theirs.float())  # the trace shares its weights
    assert load_model(path, image_size=96).config.image.image_size == 96


@KINDS
def test_the_state_dict_of_openais_archive_needs_no_architecture(tmp_path: Path, config: CLIPConfig) -> None:
    theirs = openai_model(config)
    half = {key: value.half() if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    torch.save(half, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.config == config
    assert_same(loaded, theirs)


def test_openais_weights_with_another_activation_are_refused(tmp_path: Path) -> None:
    model = openai_model(CONFIG)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = CLIPConfig.from_dict({**CONFIG.to_dict(), "activation": "gelu"})
    assert "activation quick_gelu there and gelu here" in refusal(tmp_path / "model.pt", architecture=other)


# open_clip's and our own ----------------------------------------------------------------------------------------------


def open_clip_model() -> Any:
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**MODEL_CFG).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return theirs


def save_folder(
    folder: Path, state: dict[str, Tensor], name: str = "open_clip_model.safetensors", **other: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    values = {"model_cfg": MODEL_CFG, "preprocess_cfg": preprocess, **other}
    (folder / "open_clip_config.json").write_text(json.dumps(values), encoding="utf-8")
    save = save_file if name.endswith(".safetensors") else torch.save
    save(state, folder / name)
    return folder


@pytest.mark.parametrize("name", OPEN_CLIP_WEIGHTS)
def test_an_open_clip_folder_needs_no_architecture(tmp_path: Path, name: str) -> None:
    theirs = open_clip_model()
    folder = save_folder(tmp_path / "model", theirs.state_dict(), name)
    for source in (folder, folder / name):  # the file finds the configuration beside it
        loaded = load_model(source)
        assert_same(loaded, theirs)
        assert loaded.config.activation == "quick_gelu"
        preprocessing = loaded.preprocessing
        assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
        assert (preprocessing.interpolation, preprocessing.resize_mode) == ("bilinear", "squash")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.safetensors"])
def test_a_bare_open_clip_file_needs_an_architecture(tmp_path: Path, name: str) -> None:
    theirs = open_clip_model()
    (save_file if name.endswith("s") else torch.save)(theirs.state_dict(), tmp_path / name)
    message = refusal(tmp_path / name)
    assert "do not name their model" in message
    assert f"put its name in front, as in ViT-B-32:{tmp_path / name}" in message
    named = refusal(f"ViT-B-32:{tmp_path / name}")  # accepted, but it is another model
    assert "weights do not fit" in named
    assert_same(load_model(tmp_path / name, architecture=CONFIG), theirs)
    assert_same(create_model(CONFIG, tmp_path / name).eval(), theirs)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older format"])
def test_an_open_clip_training_checkpoint_is_read(tmp_path: Path, legacy: bool) -> None:
    theirs = open_clip_model()
    optimizer = torch.optim.AdamW(theirs.parameters())
    loss = theirs.encode_image(torch.zeros(1, 3, 64, 64)).sum() + theirs.encode_text(tokenize("a", 16)).sum()
    loss.backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "name": "a run",
        "state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(load_model(tmp_path / "epoch_3.pt", architecture=CONFIG), theirs)


def test_open_clips_newer_text_encoder_layout_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = open_clip.model.CustomTextCLIP(**MODEL_CFG).eval()
    assert "text.token_embedding.weight" in theirs.state_dict()
    folder = save_folder(tmp_path, theirs.state_dict(), model_cfg={**MODEL_CFG, "custom_text": True})
    assert_same(load_model(folder), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_of_any_precision_become_float32(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    source = random_model().to(dtype)
    (save_file if name.endswith("s") else torch.save)(source.state_dict(), tmp_path / name)
    loaded = load_model(tmp_path / name, architecture=CONFIG)
    assert_same(loaded, source.float())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), source.parameters(), strict=True))


def test_our_own_checkpoint_needs_no_architecture(tiny_checkpoint: Path, tiny_config: CLIPConfig) -> None:
    loaded = load_model(tiny_checkpoint)
    assert loaded.config == tiny_config
    state = torch.load(tiny_checkpoint, weights_only=True)["state_dict"]
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_views_and_parameters_become_tensors_of_their_own(tmp_path: Path) -> None:
    """A state dict whose tensors share one block of memory, and one of ``named_parameters``."""
    source = random_model()
    block = torch.cat([value.flatten() for value in source.state_dict().values()])
    parts = block.split([value.numel() for value in source.state_dict().values()])
    views = {k: part.view(v.shape) for (k, v), part in zip(source.state_dict().items(), parts, strict=True)}
    views["visual.proj"] = views["visual.proj"].T.contiguous().T
    torch.save(views, tmp_path / "views.pt")
    torch.save(dict(source.named_parameters()), tmp_path / "parameters.pt")
    for name in ("views.pt", "parameters.pt"):
        loaded = load_model(tmp_path / name, architecture=CONFIG)
        assert_same(loaded, source)
        assert all(p.is_leaf and p.is_contiguous() for p in loaded.parameters())
        assert all(
            p.untyped_storage().nbytes() == p.nbytes for p in loaded.parameters()
        )  # else saving one tensor saves the block


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "last.ckpt", "optimizer.ckpt", "archive.pt"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_file_may_be_overwritten_or_deleted_after_loading(tmp_path: Path, name: str, tiny_checkpoint: Path) -> None:
    """Overwriting a memory-mapped file would change the weights, or end the process with a bus error."""
    path, state = tmp_path / name, random_model().state_dict()
    if name == "last.ckpt":
        path.write_bytes(tiny_checkpoint.read_bytes())
    elif name == "optimizer.ckpt":  # most of which is not read
        checkpoint = torch.load(tiny_checkpoint, weights_only=True)
        torch.save({**checkpoint, "optimizer_states": [torch.zeros(10_000_000)]}, path)
    elif name == "archive.pt":
        save_archive(openai_model(CONFIG), path)
    else:
        (save_file if name.endswith("s") else torch.save)(state, path)
    model = load_model(path, architecture=CONFIG if name.startswith("m.") else None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\x01" * size)
        file.truncate(10)
    path.unlink()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    loaded = {key: value.detach().add_(1) for key, value in model.named_parameters()}  # the weights can be modified
    assert all(torch.equal(value, before[key] + 1) for key, value in loaded.items())


def test_a_small_checkpoint_of_a_run_is_read_once(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the time of many commands would go to reading the list of its tensors, the optimiser's too, again."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    torch.save({**checkpoint, "optimizer_states": [torch.zeros(10_000_000)]}, tmp_path / "last.ckpt")
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: read.append(given) or load(*given, **options))
    model = load_model(tmp_path / "last.ckpt")
    assert len(read) == 1
    assert torch.equal(model.visual.proj, checkpoint["state_dict"]["visual.proj"])


# Mismatches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation quick_gelu there and gelu here"),
        ({"image": {"image_size": 96}}, "image.image_size 64 there and 96 here"),
        ({"image": {"width": 128}}, "image.width 64 there and 128 here"),
        ({"image": {"heads": 2}}, "image.heads 1 there and 2 here"),
        ({"text": {"context_length": 20}}, "text.context_length 16 there and 20 here"),
        ({"text": {"vocab_size": 49409}}, "text.vocab_size 49408 there and 49409 here"),
        ({"text": {"layers": 3}}, "text.layers 2 there and 3 here"),
        ({"embed_dim": 33}, "embed_dim 32 there and 33 here"),
    ],
)
def test_another_architecture_is_refused_naming_both_values(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = save_folder(tmp_path, open_clip_model().state_dict(), preprocess_cfg={})
    values = CONFIG.to_dict()
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    other = CLIPConfig.from_dict({**values, "preprocessing": None})
    assert message in refusal(folder / "open_clip_model.safetensors", architecture=other)


def test_a_name_takes_the_weights_preprocessing_a_config_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many published weights were trained with another mean than their architecture's default."""
    folder = save_folder(tmp_path, open_clip_model().state_dict())
    monkeypatch.setattr("lit_clip.weights.load.resolve_architecture", lambda name: CONFIG)
    assert create_model("tiny", folder).preprocessing.mean == (0.5, 0.5, 0.5)
    assert load_model(folder, architecture="tiny").preprocessing.mean == (0.5, 0.5, 0.5)
    monkeypatch.undo()
    assert "preprocessing.mean (0.5, 0.5, 0.5) there and (0.48" in refusal(
        folder / "open_clip_model.safetensors", architecture=CONFIG
    )


def test_a_bare_file_of_other_sizes_is_refused_naming_a_weight_and_both_shapes(tmp_path: Path) -> None:
    state = random_model().state_dict()
    torch.save(state, tmp_path / "weights.pt")
    wider = CLIPConfig(32, VisionTransformerConfig(64, 16, 128, 2, 2), CONFIG.text, "quick_gelu")
    assert "is (64,) there and (128,) here" in refusal(tmp_path / "weights.pt", architecture=wider)
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "weights.pt")
    message = refusal(tmp_path / "weights.pt", architecture=CONFIG)
    assert "ln_final.bias is absent there and (64,) here" in message
    torch.save({**random_model().state_dict(), "decoder.weight": torch.zeros(3)}, tmp_path / "weights.pt")
    assert "decoder.weight is (3,) there and absent here" in refusal(tmp_path / "weights.pt", architecture=CONFIG)


def test_integers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    """Quantised weights would otherwise be loaded as if they were floats."""
    state = {**random_model().state_dict(), "visual.proj": torch.ones(64, 32, dtype=torch.int8)}
    save_file(state, tmp_path / "weights.safetensors")
    assert "visual.proj" in refusal(tmp_path / "weights.safetensors", architecture=CONFIG)


def test_a_custom_encoder_draws_its_buffers_while_weights_without_memory_are_not_drawn() -> None:
    torch.manual_seed(0)
    wanted = [torch.randn(3), torch.nn.Linear(3, 3).weight]
    torch.manual_seed(0)
    with load._Uninitialised(), torch.device("meta"):
        assert all(tensor.is_meta for tensor in (torch.randn(3), torch.nn.Linear(3, 3).weight))
        with torch.device("cpu"):
            found = [torch.randn(3), torch.nn.Linear(3, 3).weight]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def entered(call: Callable[[], object]) -> set[str]:
    """Return the functions of lit_clip that a call enters, those in ``models/`` and comprehensions aside."""
    root, found = Path(lit_clip.__file__).parent, set[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        place = Path(code.co_filename)
        inside = event == "call" and not code.co_name.startswith("<") and place.is_relative_to(root)
        if inside and place.relative_to(root).parts[0] != "models":
            found.add(f"{place.relative_to(root)} {code.co_qualname}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_the_way_from_a_checkpoint_to_a_model_is_short(tiny_checkpoint: Path) -> None:
    """Counted without the model's own constructors; the modules are imported before."""
    for opened, most in ((load_model, 25), (LitCLIP.load_from_checkpoint, 40)):
        opened(tiny_checkpoint)
        functions = entered(partial(opened, tiny_checkpoint))
        assert 10 < len(functions) <= most, sorted(functions)


def test_the_model_of_a_checkpoint_is_built_once(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[CLIP] = []
    create = CLIP.__init__

    def noted(self: CLIP, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        create(self, *args, **kwargs)

    monkeypatch.setattr(CLIP, "__init__", noted)
    for opened in (load_model, LitCLIP.load_from_checkpoint):
        built.clear()
        opened(tiny_checkpoint)
        assert len(built) == 1
