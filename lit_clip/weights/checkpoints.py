"""Our checkpoint files: architecture, weights under OpenAI's names, a tokenizer, the base of a LoRA."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig
from lit_clip.models.custom import custom_encoders, find_class
from lit_clip.models.custom_config import how_to_import
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.weight_files import Source, read_file

EMA_WEIGHTS = "exponential moving average"  # a checkpoint's ``weights`` if its state_dict is an average


def read_checkpoint(path: Source) -> dict[str, Any]:
    """Load a file that ``lit-clip fit`` wrote, on the CPU; nothing in it is executed.

    Raises:
        InputError: no such file, not a checkpoint, or not one of lit-clip's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return checked(read_file(path), path)


def checked(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the checkpoint if it has weights and an architecture.

    Raises:
        InputError: it is not one of lit-clip's, or an encoder's class, which it only names, is not imported.
    """
    try:
        config = CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"])
        dict(checkpoint["state_dict"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a lit-clip checkpoint (it has no weights or names no architecture)") from error
    for tower, class_path in custom_encoders(config):
        if find_class(class_path) is None:
            raise InputError(f"{path}: its {tower} encoder is {class_path}; {how_to_import(class_path)}")
    return checkpoint


def saved_tokenizer(model: CLIP) -> dict[str, Any]:
    """Return a checkpoint's entry for a tokenizer other than CLIP's own, whose source may be gone later."""
    if model.config.text.tokenizer is None:
        return {}
    tokenizer: Any = model.tokenizer
    return {"tokenizer": tokenizer.to_dict()}


def checkpoint_tokenizer(checkpoint: Mapping[str, Any], config: CLIPConfig) -> TextTokenizer | None:
    """Return the tokenizer that a checkpoint holds; None if it is CLIP's own."""
    saved, text = checkpoint.get("tokenizer"), config.text
    if saved is None or text.tokenizer is None:
        return None
    whole = isinstance(text, TextTransformerConfig) and not text.causal
    return HuggingFaceTokenizer(saved["definition"], saved["pad_id"], text.tokenizer.clean, text.context_length, whole)


def check_base(checkpoint: Mapping[str, Any], ours: str, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless a checkpoint's LoRA belongs to the weights with this SHA-256."""
    base = checkpoint.get("base")
    if base is None:
        raise InputError(f"{name}: holds no LoRA; pass it as model.pretrained")
    if base["sha256"] != ours:
        raise InputError(
            f"{name}: its LoRA belongs to {base['pretrained']} with other weights "
            f"(SHA-256 {base['sha256'][:12]}... there, {ours[:12]}... here)"
        )


def base_name(pretrained: str | os.PathLike[str]) -> str:
    """Return how a checkpoint names its base: a file by its absolute path, published weights by their name."""
    return str(Path(pretrained).resolve()) if Path(pretrained).exists() else str(pretrained)
