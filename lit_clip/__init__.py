"""lit-clip: CLIP in PyTorch Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_clip.tools.imports import __version__, lazy_names

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

__getattr__ = lazy_names(__name__, __file__)  # the command line's ``--help`` pays for none of them
