"""Data modules, sources of (image, caption) pairs, and sets of labelled images."""

if __name__ == "datamodules":  # the folder of a clone
    from lit_clip.tools.imports import share_modules

    share_modules(__name__)

from typing import TYPE_CHECKING

from lit_clip.tools.imports import lazy_names

if TYPE_CHECKING:
    from .caption_datamodule import CaptionDataModule
    from .captions import Captions, NoCaptions, Splits
    from .evaluation.own_classes import ImageFolderClasses, ParquetClasses
    from .loading.augmentation import Augmentation, RandomSquareCrop
    from .loading.bad_samples import BadSamples
    from .openmoji import OpenMoji, OpenMojiClasses
    from .pairs.batch_order import BatchOptions
    from .pairs.custom import CustomPairs
    from .pairs.source import CaptionOptions, Classes, Columns, ImageOptions, ShardOptions
    from .parallel_sentences import ParallelSentences

__all__ = [
    "Augmentation",
    "BadSamples",
    "BatchOptions",
    "CaptionDataModule",
    "CaptionOptions",
    "Captions",
    "Classes",
    "Columns",
    "CustomPairs",
    "ImageFolderClasses",
    "ImageOptions",
    "NoCaptions",
    "OpenMoji",
    "OpenMojiClasses",
    "ParallelSentences",
    "ParquetClasses",
    "RandomSquareCrop",
    "ShardOptions",
    "Splits",
]

__getattr__ = lazy_names(__name__, __file__)
