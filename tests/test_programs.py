"""The code of docs/serving.md and docs/clip_benchmark.md for other programs runs and gives lit-clip's features."""

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from lit_clip import CLIP
from lit_clip.cli.subcommands import run_command
from lit_clip.commands.export import export
from lit_clip.models.config import CLIPConfig, TimmConfig, VisionTransformerConfig
from tests.conftest import ROOT
from tests.helpers.exports import checkpoint, photos

NAMES = ["a.png", "b.png", "c.png", "d.png"]


def block(page: str, word: str) -> str:
    """Return the page's block of code that has a word."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = (each for each in re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if word in each)
    return found


@pytest.fixture
def model(tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch) -> CLIP:
    """A model saved as ``last.ckpt`` in a working folder with photos."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, image in zip(NAMES, photos((70, 90), (33, 36), (64, 64), (40, 90)), strict=True):
        image.save(tmp_path / "photos" / name)
    Image.open("photos/a.png").save("photo.png")
    return checkpoint(tiny_config, tmp_path / "last.ckpt")


@pytest.fixture
def nearest(model: CLIP) -> list[str]:
    """The keys of the three photos nearest to the text of the page, by our cosines; their features' file is written."""
    words = ["embed", "photos", "--model", "last.ckpt", "--output", "features.parquet"]
    run_command([*words, "--num_workers", "0", "--accelerator", "cpu"])
    cosines = model.encode(["a red kite"]) @ model.encode([Path("photos", name) for name in NAMES]).T
    return [f"photos/{NAMES[row]}" for row in cosines[0].argsort(descending=True)[:3]]


def test_lancedb_finds_in_the_file_of_features_what_we_find(
    nearest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lancedb")
    exec(block("serving.md", "lancedb"), {})
    assert capsys.readouterr().out.splitlines()[-1] == str(nearest)


def test_qdrant_finds_in_the_file_of_features_what_we_find(
    model: CLIP, nearest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qdrant_client")
    names = {"table": pq.read_table("features.parquet"), "query": model.encode(["a red kite"])[0].numpy()}
    exec(block("serving.md", "qdrant_client"), names)
    assert capsys.readouterr().out.splitlines()[-1] == str(nearest)


def test_lines_for_pgvector_are_its_text_form_of_our_features(model: CLIP, nearest: list[str]) -> None:
    """Lists of numbers in brackets, read by its Python package where there is one."""
    exec(block("serving.md", "csv.writer"), {"table": pq.read_table("features.parquet")})
    with Path("features.csv").open(newline="") as file:
        rows = dict(csv.reader(file))
    assert [*rows] == [f"photos/{name}" for name in NAMES]
    expected = model.encode([Path(name) for name in rows]).numpy()
    assert all(re.fullmatch(r"\[[-+.e\d]+(, ?[-+.e\d]+)*\]", text) for text in rows.values())
    found = np.array([np.fromstring(text[1:-1], sep=",") for text in rows.values()], dtype=np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    pgvector: Any = pytest.importorskip("pgvector")
    for text, row in zip(rows.values(), expected, strict=True):
        np.testing.assert_allclose(pgvector.Vector.from_text(text).to_numpy(), row, rtol=0, atol=1e-6)


def test_folders_of_an_exported_model_open_in_a_pipeline_and_in_sentence_transformers(
    model: CLIP, capsys: pytest.CaptureFixture[str]
) -> None:
    export("last.ckpt", format="hugging_face", output="exported/hugging_face")
    exec(block("serving.md", "CLIPTextModel"), {})
    encoder = transformers.CLIPTextModel.from_pretrained("pipeline", subfolder="text_encoder").eval()
    tokens = transformers.CLIPTokenizer.from_pretrained("pipeline", subfolder="tokenizer")("two dogs")["input_ids"]
    with torch.no_grad():
        found = encoder(torch.tensor([tokens])).pooler_output @ model.text_encoder.text_projection  # pyright: ignore
    found = torch.nn.functional.normalize(found, dim=1)
    torch.testing.assert_close(found, model.encode(["two dogs"]), rtol=0, atol=1e-5)
    pytest.importorskip("sentence_transformers", minversion="5.4")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(block("serving.md", "SentenceTransformer"), names)
    cosines = names["model"].similarity(names["model"].encode(["a tiger"]), names["model"].encode(["a pizza"]))
    expected = model.encode(["a tiger"]) @ model.encode(["a pizza"]).T
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-5)
    shown = model.similarity(["a tiger", "a pizza"], "photo.png")
    assert [float(x) for x in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)] == pytest.approx(
        shown.flatten().tolist(), abs=1e-4
    )


@pytest.mark.parametrize("kind", ["vit_base_patch32_clip_224", "resnet10t"])
def test_timm_opens_the_image_encoder_of_a_folder_for_open_clip(
    model: CLIP, tiny_config: CLIPConfig, tmp_path: Path, kind: str
) -> None:
    """CLIP's by timm's own rule for open_clip's names; another by its own names, before the projection."""
    code, encode, image = block("serving.md", kind), model.encode_image, tiny_config.image
    if kind == "resnet10t":
        config = dataclasses.replace(tiny_config, image=TimmConfig(kind, image_size=32), preprocessing=None)
        visual: Any = checkpoint(config, tmp_path / "last.ckpt").visual
        encode = visual.features
    else:
        assert isinstance(image, VisionTransformerConfig)
        sizes = f"img_size={image.image_size}, patch_size={image.patch_size}, embed_dim={image.width}"
        sizes += f", depth={image.layers}, num_heads={image.heads}"
        code = code.replace("512", str(tiny_config.embed_dim)).replace(f'"{kind}"', f'"{kind}", {sizes}')
    export("last.ckpt", format="open_clip", output="exported/open_clip")
    names: dict[str, Any] = {}
    exec(code, names)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(names["encoder"](pixels), encode(pixels), rtol=1e-5, atol=1e-5)


def test_the_adapter_runs_a_task_of_mteb_with_our_features(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a made task, by their prompts; accuracy is that of our own cosines."""
    mteb: Any = pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb.mocks.mock_tasks.zeroshot_classification import MockZeroShotClassificationTask

    names: dict[str, Any] = {}
    exec(block("clip_benchmark.md", "AbsEncoder"), names)
    images, prompts = photos(*[(40, 40)] * 12), ["a tiger", "a pizza", "two dogs"]
    labels = [row % 3 for row in range(12)]

    class Task(MockZeroShotClassificationTask):
        def load_data(self, **_: Any) -> None:
            data = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
            self.dataset = datasets.DatasetDict({"test": data})
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return prompts

    kept: list[Any] = []
    encode = names["Encoder"].encode
    monkeypatch.setattr(names["Encoder"], "encode", lambda *a, **k: kept.append(encode(*a, **k)) or kept[-1])
    (result,) = mteb.evaluate(names["model"], [Task()], cache=None, co2_tracker=False).task_results
    ours = model.encode(images), model.encode(prompts)
    for each in kept:
        torch.testing.assert_close(torch.from_numpy(each), ours[len(each) == 3], rtol=0, atol=1e-5)
    assert {len(each) for each in kept} == {3, 12}
    right = ((ours[0] @ ours[1].T).argmax(dim=1) == torch.tensor(labels)).float().mean()
    assert result.scores["test"][0]["accuracy"] == pytest.approx(float(right), abs=1e-6)
