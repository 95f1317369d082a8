"""A checkpoint of open_clip's trainer opens by its path with open_clip's features, or one line says what is missing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args

from lit_clip import create_model, load_model
from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models import open_clip_configs
from tests.helpers.exports import TEXTS, photos
from tests.weights.test_hub import cache, put
from tests.weights.test_load import refusal

__all__ = ["cache"]  # a fixture
pytestmark = pytest.mark.usefixtures("offline", "registry")

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-quickgelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-64": {"embed_dim": 16, "vision_cfg": {**VIT, "image_size": 64}, "text_cfg": TEXT},
    "tiny-deep": {"embed_dim": 16, "vision_cfg": {**VIT, "layers": 2}, "text_cfg": TEXT},
    "tiny-rn": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-timm": {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give open_clip's list tiny models: here, and in open_clip itself."""
    folder = tmp_path_factory.mktemp("model_configs")
    for name, model in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip_configs, "configs_folder", lambda: folder)
        open_clip_configs.open_clip_names.cache_clear()
        open_clip.add_model_config(folder)
        yield
    open_clip_configs.open_clip_names.cache_clear()


def run_of(folder: Path, *options: str, prefix: str = "", params: bool = True) -> tuple[Path, Any, Any]:
    """Write a run as ``open_clip_train.main`` does; return its checkpoint, open_clip's model and its transform."""
    args: Any = parse_args(["--name", "run", *options])
    size: Any = args.force_image_size
    args.force_image_size = size = size[0] if isinstance(size, list) and len(size) == 1 else size
    bias: dict[str, Any] = {"init_logit_bias": -10} if args.siglip else {}
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(
        args.model,
        force_quick_gelu=args.force_quick_gelu,
        force_image_size=size,
        force_context_length=args.force_context_length,
        image_mean=args.image_mean,
        image_std=args.image_std,
        image_interpolation=args.image_interpolation,
        image_resize_mode=args.image_resize_mode,
        **bias,
    )
    (folder / "run/checkpoints").mkdir(parents=True)
    if params:
        lines = [f"{name}: {getattr(args, name)}\n" for name in sorted(vars(args))]
        (folder / "run/params.txt").write_text("".join(lines))
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    path = folder / "run/checkpoints/epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": optimizer}, path)
    return path, model.eval(), preprocess


def assert_same(path: Path | str, theirs: Any, preprocess: Any) -> None:
    ours = load_model(path)
    images, tokens = photos((70, 90), (90, 70)), ours.tokenize(TEXTS)
    pixels = torch.stack([preprocess(image) for image in images])
    torch.testing.assert_close(torch.stack([ours.preprocess(image) for image in images]), pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels), rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=1e-4)
    assert (ours.logit_bias is None) == (theirs.logit_bias is None)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["one process", "DDP"])
@pytest.mark.parametrize(
    "options",
    [
        ("--model", "tiny"),
        ("--model", "tiny", "--force-quick-gelu"),
        ("--model", "tiny-quickgelu", "--siglip"),
        ("--model", "tiny", "--force-image-size", "64", "--force-context-length", "20"),
        ("--model", "tiny", "--force-image-size", "32", "64"),
        ("--model", "tiny-rn", "--image-mean", "0.1", "0.2", "0.3", "--image-std", "0.5", "0.5", "0.5"),
        ("--model", "tiny-timm", "--image-interpolation", "bilinear", "--image-resize-mode", "squash"),
        ("--model", "tiny/quickgelu", "--image-interpolation", "random"),
    ],
    ids=" ".join,
)
def test_a_run_opens_by_its_checkpoints_path(tmp_path: Path, options: tuple[str, ...], prefix: str) -> None:
    assert_same(*run_of(tmp_path, *options, prefix=prefix))


def test_params_txt_beside_the_checkpoint_is_found_and_every_way_to_open_it_agrees(tmp_path: Path) -> None:
    path, theirs, preprocess = run_of(tmp_path, "--model", "tiny", "--force-quick-gelu")
    (tmp_path / "copied").mkdir()
    for file in (path, path.parents[1] / "params.txt"):
        file.rename(tmp_path / "copied" / file.name)
    path = tmp_path / "copied/epoch_1.pt"
    assert_same(path, theirs, preprocess)
    assert_same(f"tiny-quickgelu:{path}", theirs, preprocess)
    assert create_model(None, path).config == create_model("tiny-quickgelu", path).config == load_model(path).config
    export(str(path), format="open_clip", output=str(tmp_path / "out"))
    assert_same(tmp_path / "out", theirs, preprocess)
    for name, architecture in ((f"tiny:{path}", None), (path, "tiny")):
        with pytest.raises(InputError, match="activation quick_gelu there and gelu here"):
            load_model(name, architecture)


@pytest.mark.parametrize("model", ["tiny-rn", "tiny-deep", "tiny-64", "tiny-timm"])
def test_without_params_txt_the_architecture_follows_from_the_shapes(tmp_path: Path, model: str) -> None:
    path, theirs, preprocess = run_of(tmp_path, "--model", model, "--siglip", prefix="module.", params=False)
    with pytest.warns(UserWarning, match=f"read as {model}, the only model with its shapes"):
        assert_same(path, theirs, preprocess)


def test_what_the_shapes_leave_open_is_one_line_with_the_candidates(tmp_path: Path) -> None:
    path, theirs, preprocess = run_of(tmp_path, "--model", "tiny", "--siglip", params=False)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert "its weights fit tiny, tiny-quickgelu; put the name of its model in front" in str(caught.value)
    assert f"as in tiny:{path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same(f"tiny:{path}", theirs, preprocess)


def test_shapes_of_no_listed_model_ask_for_a_name_or_params_txt(tmp_path: Path) -> None:
    path, *_ = run_of(tmp_path, "--model", "tiny", "--force-context-length", "9", params=False)
    with pytest.raises(InputError, match=r"put its name in front.*or put the params\.txt of its open_clip run beside"):
        load_model(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: tiny\n", "model: ../../etc/passwd\n", r"names '..-..-etc-passwd', which open_clip does not list"),
        ("model: tiny\n", "model: hf-hub:org/secret\n", "names 'hf-hub:org-secret', which open_clip does not list"),
        ("model: tiny\n", "model: tiny-rn\n", r"tiny-rn by params.txt\): weights do not fit"),
        ("force_image_size: None", "force_image_size: 10000000", "image_size"),
        ("force_image_size: None", "force_image_size: [" * 9000, "not a readable|nested|damaged|params.txt"),
        ("force_context_length: None", "force_context_length: 99999999999", "context_length"),
        ("force_context_length: None", "force_context_length: __import__('os')", "params.txt"),
        ("image_mean: None", "image_mean: [NaN, 1, 1]", "mean"),
        ("image_interpolation: None", "image_interpolation: lanczos", "interpolation 'lanczos'"),
    ],
)
def test_params_txt_is_data(tmp_path: Path, old: str, new: str, message: str) -> None:
    path, *_ = run_of(tmp_path, "--model", "tiny")
    params = path.parents[1] / "params.txt"
    assert old in params.read_text()
    params.write_text(params.read_text().replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("content", [b"", b"model\n\xff\xfe", b"notes of mine: model\n", b"x" * 2**20])
def test_another_file_of_that_name_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path, *_ = run_of(tmp_path, "--model", "tiny-rn", params=False)
    (path.parent / "params.txt").write_bytes(content)
    with pytest.warns(UserWarning, match="read as tiny-rn"):
        load_model(path)


def test_a_file_in_a_repository_of_the_hub_opens_by_its_name(tmp_path: Path, cache: Path) -> None:
    """RemoteCLIP's and GeoRSCLIP's repositories hold bare weights of several models, and no configuration."""
    (tmp_path / "files").mkdir()
    made = {name: open_clip.create_model_and_transforms(name) for name in ("tiny", "tiny-deep")}
    for name, (model, _, _) in made.items():
        torch.save(model.eval().state_dict(), tmp_path / "files" / f"Remote[{name}].pt")
    put(cache, "somebody/remote", tmp_path / "files")
    name = "somebody/remote/Remote[tiny].pt"
    for source in (f"tiny:{name}", f"hf-hub:tiny:{name}"):
        assert_same(source, made["tiny"][0], made["tiny"][2])
    with pytest.warns(UserWarning, match=r"Remote\[tiny-deep\].pt: .*; read as tiny-deep, the only model"):
        assert_same("hf-hub:somebody/remote/Remote[tiny-deep].pt", made["tiny-deep"][0], made["tiny-deep"][2])
    assert f"fit tiny, tiny-quickgelu; put the name of its model in front, as in tiny:{name}" in refusal(name)
    assert "not in the repository somebody/remote" in refusal("somebody/remote/other.pt")
    assert "not available from the hub" in refusal("nobody/nothing/other.pt")


def test_a_file_of_the_hub_is_data_and_its_name_stays_in_the_repository(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "files").mkdir()
    torch.save({"weights": print}, tmp_path / "files" / "model.pt")
    put(cache, "somebody/bad", tmp_path / "files")
    with pytest.raises(InputError, match="nothing in it was run"):
        load_model("somebody/bad/model.pt")
    torch.save({}, cache / "outside.pt")
    for name in ("somebody/bad/../../../outside.pt", "somebody/bad//model.pt", "somebody/../outside.pt"):
        with pytest.raises(InputError, match="no such"):
            load_model(name)


def test_a_mistyped_path_in_a_folder_here_is_not_asked_of_the_hub(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "hub" not in refusal("runs/table/epoch_1.pt")
