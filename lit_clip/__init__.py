"""lit-clip: CLIP in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_clip.batch import CaptionBatch, LabelledBatch
    from lit_clip.config import CLIPConfig
    from lit_clip.model import CLIP
    from lit_clip.module import LitCLIP
    from lit_clip.preprocess import image_transform
    from lit_clip.registry import list_models
    from lit_clip.tokenizer import tokenize
    from lit_clip.weights import create_model, load_model
    from lit_clip.zero_shot import zero_shot_classifier

_HOMES = {
    "CLIP": "model",
    "CLIPConfig": "config",
    "CaptionBatch": "batch",
    "LabelledBatch": "batch",
    "LitCLIP": "module",
    "create_model": "weights",
    "image_transform": "preprocess",
    "list_models": "registry",
    "load_model": "weights",
    "tokenize": "tokenizer",
    "zero_shot_classifier": "zero_shot",
}

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "CLIPConfig",
    "CaptionBatch",
    "LabelledBatch",
    "LitCLIP",
    "create_model",
    "image_transform",
    "list_models",
    "load_model",
    "tokenize",
    "zero_shot_classifier",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line's ``--help`` pays for none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_clip' has no attribute {name!r}")
    return getattr(import_module(f"lit_clip.{_HOMES[name]}"), name)
