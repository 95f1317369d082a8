"""Published models of several domains open by the configuration that their owners publish.

The configurations are theirs but for sizes: widths, layers and vocabularies are small and the weights random, with the
names of the published files. MODELS says for each where its form is from.
"""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks.families.families import compare, made_small, model_cfg, save_tokenizer, write_folder
from lit_clip import load_model
from tests.conftest import lit_clip_command
from tests.helpers.exports import photos
from tests.helpers.towers import TEXTS
from tests.weights.test_hub import put
from tests.weights.test_hugging_face import randomised
from tests.weights.test_published_forms import assert_owners

pytestmark = pytest.mark.usefixtures("offline", "cache")

VIT_B_32 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
VIT_B_16, VIT_L_14 = {**VIT_B_32, "patch_size": 16}, {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
TEXT_B = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
TEXT_L = {**TEXT_B, "width": 768, "heads": 12}
BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}
SIGLIP: dict[str, Any] = model_cfg("ViT-B-16-SigLIP")
OPENVISION = {
    "embed_dim": 192,
    "vision_cfg": {
        **{"image_size": 160, "layers": 12, "width": 192, "patch_size": 16, "no_ln_pre": True, "pool_type": "avg"},
        **{"final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-06}, "head_width": 64},
    },
    "text_cfg": {
        **{"context_length": 80, "vocab_size": 32000, "hf_tokenizer_name": "bert-base-uncased"},
        **{"tokenizer_kwargs": {"strip_sep_token": True}, "width": 192, "heads": 3, "layers": 12, "pool_type": "last"},
        **{"no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-06}},
    },
}
# model_cfg and preprocess_cfg of open_clip_config.json
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BiomedCLIP": (  # its published file
        {
            "embed_dim": 512,
            "vision_cfg": {
                **{"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False},
                **{"timm_pool": "", "timm_proj": "linear", "image_size": 224},
            },
            "text_cfg": {
                **{"hf_model_name": BIOMEDBERT, "hf_tokenizer_name": BIOMEDBERT, "hf_proj_type": "mlp"},
                **{"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256},
            },
        },
        OPENAI,
    ),
    # open_clip's ViT-B-16, ViT-L-14 and ViT-B-32 by their owners' descriptions
    "BioCLIP": ({"embed_dim": 512, "vision_cfg": VIT_B_16, "text_cfg": TEXT_B}, OPENAI),
    "BioCLIP 2": ({"embed_dim": 768, "vision_cfg": VIT_L_14, "text_cfg": TEXT_L}, OPENAI),
    "QuiltNet-B-32": ({"embed_dim": 512, "vision_cfg": VIT_B_32, "text_cfg": TEXT_B}, OPENAI),
    "Marqo-FashionCLIP": ({"embed_dim": 512, "vision_cfg": VIT_B_16, "text_cfg": TEXT_B}, OPENAI),
    "Marqo-FashionSigLIP": (SIGLIP, HALF),  # fine-tuned from this model of open_clip
    "OpenVision": (OPENVISION, {**IMAGENET, "resize_mode": "squash"}),  # the published file of its tiny model
}
# vision_config and text_config of CLIPModels, whose owners fine-tuned OpenAI's; the size of the image
CLIP_MODELS = {
    "PLIP": (32, 224),
    "PubMedCLIP": (32, 224),
    "StreetCLIP": (14, 336),
    "CLIP-KO": (14, 224),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache, offline, that holds a small BERT under the name that BiomedCLIP's text encoder has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = tmp_path / "bert"
    files.mkdir()
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 48
    config = transformers.BertConfig(**sizes, vocab_size=save_tokenizer("bert", files))
    transformers.BertModel(config).save_pretrained(files)  # open_clip starts from the weights, lit-clip reads the sizes
    put(tmp_path / "hub", BIOMEDBERT, files)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_open_clips_form_has_open_clips_features_ids_and_pixels(tmp_path: Path, name: str) -> None:
    cfg, preprocess = copy.deepcopy(MODELS[name])
    folder = tmp_path / "model"
    folder.mkdir()
    theirs = write_folder(folder, made_small(cfg), preprocess)
    parity = compare(folder, theirs, load_model(folder))
    assert parity.tokens
    assert max(parity.image, parity.text) < 1e-5
    assert parity.pixels < 1e-3


def test_the_documented_command_fine_tunes_bioclip_2_by_its_name(
    cache: Path, tmp_path: Path, caption_table: Path
) -> None:
    """docs/domains.md: with random weights of the published form, on drawings."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder, made_small(copy.deepcopy(MODELS["BioCLIP 2"][0])), OPENAI)
    put(cache, "imageomics/bioclip-2", folder)
    for number, line in enumerate(caption_table.read_text(encoding="utf-8").splitlines()[1:7]):
        for classes in ("my_classes", "other_classes"):
            place = tmp_path / classes / str(number)
            place.mkdir(parents=True)
            shutil.copy(caption_table.parent / line.split(",")[0], place)
    text = (Path(__file__).parents[2] / "docs/domains.md").read_text(encoding="utf-8")
    (command,) = (line for line in text.splitlines() if "imageomics/bioclip-2 --data.train" in line)
    environment = dict(word.split("=") for word in command.split()[:2]) | {"HF_HUB_CACHE": str(cache)}
    words = command.replace("captions.csv", str(caption_table)).split()[3:]
    few = ["--data.batch_size", "8", "--data.num_workers", "0", "--trainer.max_steps", "2"]
    few += ["--trainer.accelerator", "cpu", "--model.freeze.image.unlock_last", "1"]
    run = lit_clip_command(tmp_path, *words, *few, environment=environment, new=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"other_classes zero-shot top-1 +. +6 ", run.stdout), run.stdout[
        -1500:
    ]  # the table before and after
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    assert load_model(checkpoint).config == load_model(folder).config


@pytest.mark.parametrize("name", CLIP_MODELS)
def test_a_model_of_transformers_form_has_the_features_and_pixels_of_its_class(tmp_path: Path, name: str) -> None:
    patch, size = CLIP_MODELS[name]
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**vision, "eos_token_id": 2, "projection_dim": 48}
    vision |= {"image_size": size, "patch_size": patch, "projection_dim": 48}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    theirs = randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(tmp_path)
    check(tmp_path, theirs, transformers.CLIPImageProcessorPil)


def test_medsiglip_has_the_features_ids_and_pixels_of_a_siglip_model_of_448_pixels(tmp_path: Path) -> None:
    """Patches of 14 pixels and MLPs of So400m's ratio."""
    vocabulary = save_tokenizer("siglip", tmp_path)
    sizes = {"hidden_size": 48, "intermediate_size": 179, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "max_position_embeddings": 64, "vocab_size": vocabulary, "projection_size": 48}
    vision = {**sizes, "image_size": 448, "patch_size": 14}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    theirs = randomised(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 448, "width": 448}, resample=2).save_pretrained(tmp_path)
    check(tmp_path, theirs, transformers.SiglipImageProcessorPil)


def check(folder: Path, theirs: Any, processor: Any) -> None:
    """Compare with the owner's class: features, and pixels by the folder's processor."""
    ours = load_model(folder)
    images = photos((400, 500), (500, 380))
    pixels = processor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    assert_owners(ours, theirs, ours.tokenize(TEXTS), pixels, images)


def test_the_table_of_published_models_has_the_sum_that_stands_above_it() -> None:
    text = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| (\d+) \| ([^|]*)\|", text, re.MULTILINE)
    opens = sum(int(number) for number, how in rows if not how.startswith("no:"))
    total = sum(int(number) for number, _ in rows)
    assert f"Of the {total} published CLIPs that we know by name, {opens} open" in text
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"[{opens} of the {total} published CLIPs]" in readme
