"""lit-clip: CLIP in PyTorch Lightning."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_clip.version import __version__

if TYPE_CHECKING:
    from lit_clip.batch import CaptionBatch
    from lit_clip.evaluation.zero_shot import zero_shot_classifier
    from lit_clip.models.clip import CLIP
    from lit_clip.models.config import CLIPConfig
    from lit_clip.models.preprocess import image_transform
    from lit_clip.models.registry import list_models
    from lit_clip.models.tokenizer import tokenize
    from lit_clip.module import LitCLIP
    from lit_clip.weights.load import create_model, load_model

if not Path(__file__).with_name("callbacks").is_dir():  # a clone has callbacks/ and datamodules/ beside this folder
    __path__.append(str(Path(__file__).parents[1]))

_HOMES = {
    "CLIP": "models.clip",
    "CLIPConfig": "models.config",
    "CaptionBatch": "batch",
    "LitCLIP": "module",
    "create_model": "weights.load",
    "image_transform": "models.preprocess",
    "list_models": "models.registry",
    "load_model": "weights.load",
    "tokenize": "models.tokenizer",
    "zero_shot_classifier": "evaluation.zero_shot",
}

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CaptionBatch",
    "LitCLIP",
    "__version__",
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
