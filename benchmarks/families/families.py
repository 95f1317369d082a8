"""Models of open_clip's registry by family: the same random weights in open_clip and in lit-clip."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from datamodules.openmoji import read_table
from lit_clip.models.clip import CLIP
from lit_clip.models.open_clip_configs import configs_folder
from tests.helpers.towers import shaken

# One published weight of each family; the others of a family differ in sizes alone.
FAMILIES = {
    "the paper's ResNets": "RN50:openai",
    "the paper's ViTs, OpenCLIP, DataComp, MetaCLIP, DFN": "ViT-B-32:laion2b_s34b_b79k",
    "CLIPA": "ViT-L-14-CLIPA:datacomp1b",
    "MetaCLIP 2 worldwide": "ViT-H-14-worldwide:metaclip2_worldwide",
    "CoCa": "coca_ViT-B-32:laion2b_s13b_b90k",
    "MobileCLIP-B": "MobileCLIP-B:datacompdr",
    "MobileCLIP-S, MobileCLIP2-S": "MobileCLIP2-S0:dfndr2b",
    "MobileCLIP2-L": "MobileCLIP2-L-14:dfndr2b",
    "SigLIP": "ViT-B-16-SigLIP:webli",
    "SigLIP 2": "ViT-B-32-SigLIP2-256:webli",
    "PE-Core": "PE-Core-T-16-384:meta",
    "EVA": "EVA02-B-16:merged2b_s8b_b131k",
    "ViTamin": "ViTamin-S:datacomp1b",
    "ConvNeXt": "convnext_base:laion400m_s13b_b51k",
}
TEXTS = [
    "a photo of a dog",
    "TWO green birds, in the rain!! (and one cat)",
    " ".join(["a very long caption about a red car"] * 20),  # truncated
    "!",
    "caf&eacute; naïve 中文",
    "",
]
# timm's models in small models, and their image sizes: small ones of the same kind.
_SMALL_TIMM = {
    "vit_base_patch16_224": ("test_vit", 160),
    "vit_base_mci_224": ("vit_base_mci_224", 224),
    "fastvit_mci0": ("fastvit_mci0", 64),
    "vit_large_patch14_clip_224": ("test_vit", 160),
    "vit_base_patch16_siglip_224": ("test_vit3", 160),
    "vit_base_patch32_siglip_256": ("test_vit3", 160),
    "vit_pe_core_tiny_patch16_384": ("vit_pe_core_tiny_patch16_384", 384),
    "eva02_base_patch16_clip_224": ("eva02_tiny_patch14_224", 224),
    "vitamin_small_224": ("vitamin_small_224", 224),
    "convnext_base": ("test_convnext", 64),
}


class Parity(NamedTuple):
    """The largest differences of lit-clip from open_clip.

    Attributes:
        image: of unit image features.
        text: of unit text features.
        pixels: of preprocessed images, in levels of 255.
        tokens: whether all token ids are equal.
    """

    image: float
    text: float
    pixels: float
    tokens: bool


def model_cfg(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model."""
    return json.loads((configs_folder() / f"{name}.json").read_text(encoding="utf-8"))


def made_small(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the same kind with two narrow blocks, or a small one of timm's models."""
    cfg = copy.deepcopy(cfg)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    cfg["embed_dim"] = 96 if vision.get("timm_proj") == "none" else 64
    text |= {"width": 64, "heads": 2, "layers": 2}
    if vision.get("timm_model_name"):
        named, size = _SMALL_TIMM[vision["timm_model_name"]]
        vision |= {"timm_model_name": named, "image_size": size}
    elif isinstance(vision["layers"], list):
        vision |= {"width": 16, "layers": [1, 1, 1, 1], "image_size": 64}
    else:
        vision |= {"width": 64, "head_width": 32, "layers": 2, "image_size": 3 * vision["patch_size"]}
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= {"width": 64, "heads": 2, "layers": 1}
    return cfg


def write_folder(folder: Path, cfg: dict[str, Any], preprocess: dict[str, Any]) -> Any:
    """Write a published model's folder with random weights, all of which matter; return open_clip's model."""
    cfg = copy.deepcopy(cfg)
    text = cfg["text_cfg"]
    if text.get("hf_tokenizer_name"):
        text["vocab_size"] = max(
            save_tokenizer(text["hf_tokenizer_name"], folder), min(text.get("vocab_size", 0), 1000)
        )
    cfg["text_cfg"].pop("hf_model_pretrained", None)
    kept = ("mean", "std", "interpolation", "resize_mode")
    chosen = {key: preprocess[key] for key in kept if preprocess.get(key) is not None}
    if preprocess.get("quick_gelu"):
        cfg["quick_gelu"] = True
    values = {"model_cfg": cfg, "preprocess_cfg": {"size": cfg["vision_cfg"]["image_size"], **chosen}}
    (folder / "open_clip_config.json").write_text(json.dumps(values), encoding="utf-8")
    torch.manual_seed(0)
    theirs = shaken(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    set_statistics(theirs.visual, cfg["vision_cfg"]["image_size"])
    theirs.eval()
    save_file(
        {key: value.contiguous() for key, value in theirs.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return theirs


@torch.no_grad()
def set_statistics(visual: nn.Module, size: Any) -> None:
    """Set a BatchNorm's statistics to those of images: with arbitrary ones all images get the same features."""
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        visual.train()(photos(2, size))


def small(folder: Path, weights: str) -> Any:
    """Write the folder of a small model like a ``model:tag`` of the registry; return open_clip's model."""
    name, _, tag = weights.partition(":")
    return write_folder(folder, made_small(model_cfg(name)), cast(dict[str, Any], get_pretrained_cfg(name, tag)))


def save_tokenizer(name: str, folder: Path) -> int:
    """Save a tokenizer of the same kind with a vocabulary learned here; return its size.

    ``bert``: WordPiece; ``xlm``: Unigram between <s> and </s>, padded with id 1; others: SigLIP's.
    """
    corpus = [emoji.name for emoji in read_table()] + TEXTS
    if "bert" in name.lower():
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer, template = Tokenizer(models.WordPiece(unk_token="[UNK]")), "[CLS] $A [SEP]"
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special)
        roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    else:
        xlm = "xlm" in name
        special = ["<s>", "<pad>", "</s>", "<unk>"] if xlm else ["<pad>", "</s>", "<unk>"]
        tokenizer, template = Tokenizer(models.Unigram()), "<s> $A </s>" if xlm else "$A </s>"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>")
        roles = {"pad": "<pad>" if xlm else "</s>", "unk": "<unk>", "eos": "</s>"}
    tokenizer.train_from_iterator(corpus, trainer)
    used = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    named: dict[str, Any] = {f"{role}_token": token for role, token in roles.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def photos(number: int, size: Any) -> Tensor:
    """Smooth images, like photographs: a random network gives all noise the same features."""
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.randn(number, 3, 7, 7, generator=generator), size, mode="bicubic")


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Return images of noise of these heights and widths."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def compare(folder: Path, theirs: Any, ours: CLIP) -> Parity:
    """Compare a model in a folder with lit-clip's model of the same weights."""
    name = f"local-dir:{folder}"
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    preprocess: Any = image_transform_v2(PreprocessCfg(**_preprocess_cfg(folder)), is_train=False)
    images = noise((300, 500), (500, 300), (120, 90))
    pixels, expected = (torch.stack([make(image) for image in images]) for make in (ours.preprocess, preprocess))
    std = torch.tensor(ours.preprocessing.std)[:, None, None]
    inputs = photos(2, ours.visual.image_size)
    image, text = ours.encode_image(inputs, normalize=True), ours.encode_text(tokens, normalize=True)
    assert float((image[0] - image[1]).abs().max()) > 1e-3, "the comparison would prove nothing"
    assert float((text[0] - text[1]).abs().max()) > 1e-3, "the comparison would prove nothing"
    their_image, their_text = (
        F.normalize(x, dim=-1) for x in (theirs.encode_image(inputs), theirs.encode_text(tokens))
    )
    return Parity(
        float((image - their_image).abs().max()),
        float((text - their_text).abs().max()),
        float(((pixels - expected) * std).abs().max()) * 255,
        torch.equal(tokens, ours.tokenize(TEXTS)),
    )


def _preprocess_cfg(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["preprocess_cfg"]
