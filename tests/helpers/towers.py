"""Tiny towers for tests: timm's, and encoders of transformers with tokenizers of a few words."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    Size,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.models.external import TimmImageEncoder
from lit_clip.models.external_settings import with_external_settings
from lit_clip.module import LitCLIP
from lit_clip.weights.load import create_model

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "dog",
    "cat",
    "sofa",
    "red",
    "sports",
    "car",
    "two",
    "green",
    "birds",
    "in",
    "rain",
    "and",
    "one",
    "very",
    "long",
    "caption",
]
TEXTS = ["a dog", "two green birds in the rain and one very long caption of a red sports car", "the cat", "a", ""]
D = 24
SMALL_TEXT = TextTransformerConfig(8, 50, 64, 1, 1)  # the default one has 63 million parameters


def shaken(model: nn.Module) -> Any:
    """Make every weight matter: many models start with gains of zero or a millionth, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def image_tower(name: str, embed_dim: int = D, **settings: Any) -> TimmImageEncoder:
    config = with_external_settings(CLIPConfig(embed_dim, TimmConfig(name, **settings), SMALL_TEXT))
    assert isinstance(config.image, TimmConfig)
    return shaken(TimmImageEncoder(config.image, embed_dim)).eval()


def image_tower_from(path: Path, name: str = "test_efficientnet", **settings: Any) -> TimmImageEncoder:
    tower = create_model(CLIPConfig(D, TimmConfig(name, pretrained=str(path), **settings), SMALL_TEXT)).visual
    assert isinstance(tower, TimmImageEncoder)
    return tower


def photos(size: Size, number: int = 2) -> Tensor:
    return torch.randn(number, 3, *height_width(size), generator=torch.Generator().manual_seed(2))


def assert_all_trainable_weights_are_used(tower: nn.Module, inputs: Tensor) -> None:
    """Check what DDP without find_unused_parameters needs."""
    tower.train()(inputs).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []


def saved(module: LitCLIP, folder: Path) -> tuple[Path, CLIP]:
    """Save a checkpoint as training does; return it and the model in evaluation mode."""
    from lightning.pytorch import Trainer

    shaken(module)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "saved.ckpt", weights_only=True)
    return folder / "saved.ckpt", module.model.eval()


_SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40}
_ROBERTA = {**_SIZES, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
# model type -> sizes, the tokenizer's special tokens in the order of their ids, and its template.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "bert": ({**_SIZES, "pad_token_id": 0}, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]"),
    "roberta": (_ROBERTA, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>"),
    "t5": ({**_T5, "pad_token_id": 0, "eos_token_id": 1}, ["<pad>", "</s>", "<unk>"], "$A </s>"),
    "mt5": ({**_T5, "pad_token_id": 0, "eos_token_id": 1}, ["<pad>", "</s>", "<unk>"], "$A </s>"),
    "modernbert": (
        {**_SIZES, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
    ),
    "distilbert": (
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40},
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
    ),
    # A decoder whose tokenizer adds nothing: an empty text has no tokens at all.
    "gpt2": (
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 1},
        ["<pad>", "</s>", "<unk>"],
        "$A",
    ),
    "bart": (
        {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
        | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
        ["<s>", "<pad>", "</s>", "<unk>"],
        "<s> $A </s>",
    ),
}


def save_words(folder: Path, special: list[str], template: str, **settings: Any) -> None:
    """Save a tokenizer of whole words."""
    unknown = next(token for token in special if "unk" in token.lower())
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template != "$A":
        added = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    padding = next(token for token in special if "pad" in token.lower())
    settings = {"pad_token": padding, "unk_token": unknown, **settings}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def save_family(family: str, folder: Path, **sizes: Any) -> Path:
    settings, special, template = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**settings, **sizes})
    shaken(transformers.AutoModel.from_config(config)).save_pretrained(folder)
    save_words(folder, special, template)
    return folder


def text_config(folder: Path, embed_dim: int = D, **settings: Any) -> CLIPConfig:
    text = HuggingFaceTextConfig(str(folder), **{"context_length": 32, **settings})
    return with_external_settings(CLIPConfig(embed_dim, VisionTransformerConfig(32, 16, 64, 1, 1), text))


def text_model(folder: Path, embed_dim: int = D, **settings: Any) -> CLIP:
    return create_model(text_config(folder, embed_dim, **settings)).eval()
