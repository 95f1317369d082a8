"""What a checkpoint of ours holds: architecture, weights under OpenAI's names, a tokenizer, the base of a LoRA."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.weight_files import Source, read_file

EMA_WEIGHTS = "exponential moving average"  # what a checkpoint's ``weights`` says of its state_dict, if so


def read_checkpoint(path: Source) -> dict[str, Any]:
    """Load a file that ``lit-clip fit`` wrote, on the CPU; nothing in it is executed.

    Raises:
        InputError: no such file, not a checkpoint, or not one of lit-clip's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return _checked(read_file(path), path)


def _checked(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"])
        dict(checkpoint["state_dict"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a lit-clip checkpoint (it has no weights or names no architecture)") from error
    return checkpoint


def saved_tokenizer(model: CLIP) -> dict[str, Any]:
    """What a checkpoint holds of a tokenizer that is not the paper's: its source may be gone later."""
    if model.config.text.tokenizer is None:
        return {}
    tokenizer: Any = model.tokenizer
    return {"tokenizer": {"definition": tokenizer.definition, "pad_id": tokenizer.pad_id}}


def checkpoint_tokenizer(checkpoint: Mapping[str, Any], config: CLIPConfig) -> TextTokenizer | None:
    """The tokenizer that lies in a checkpoint of lit-clip's, if it is not the paper's."""
    saved, text = checkpoint.get("tokenizer"), config.text
    if saved is None or text.tokenizer is None:
        return None
    from lit_clip.models.hf_tokenizer import HuggingFaceTokenize

    whole = isinstance(text, TextTransformerConfig) and not text.causal
    return HuggingFaceTokenize(saved["definition"], saved["pad_id"], text.tokenizer.clean, text.context_length, whole)


def check_base(checkpoint: Mapping[str, Any], ours: str, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless a checkpoint's additions belong to the weights with a fingerprint."""
    base = checkpoint.get("base")
    if base is None:
        raise InputError(f"{name}: holds no LoRA; give it as model.pretrained")
    if base["sha256"] != ours:
        raise InputError(
            f"{name}: its LoRA belongs to {base['pretrained']} with other weights "
            f"(SHA-256 {base['sha256'][:12]}... there, {ours[:12]}... here)"
        )


def base_name(pretrained: str | os.PathLike[str]) -> str:
    """How a checkpoint names its base: a file by its absolute path, a published one as it is called."""
    return str(Path(pretrained).resolve()) if Path(pretrained).exists() else str(pretrained)
