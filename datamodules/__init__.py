"""Data modules, sources of (image, caption) pairs, and sets of labelled images."""

from datamodules.caption_datamodule import CaptionDataModule
from datamodules.captions import Captions, NoCaptions, Splits
from datamodules.evaluation.own_classes import ImageFolderClasses, ParquetClasses
from datamodules.loading.augmentation import Augmentation, RandomSquareCrop
from datamodules.loading.bad_samples import BadSamples
from datamodules.openmoji import OpenMoji, OpenMojiClasses
from datamodules.pairs.custom import CustomPairs
from datamodules.pairs.source import CaptionOptions, Classes, Columns
from datamodules.shards.pairs import ShardOptions

__all__ = [
    "Augmentation",
    "BadSamples",
    "CaptionDataModule",
    "CaptionOptions",
    "Captions",
    "Classes",
    "Columns",
    "CustomPairs",
    "ImageFolderClasses",
    "NoCaptions",
    "OpenMoji",
    "OpenMojiClasses",
    "ParquetClasses",
    "RandomSquareCrop",
    "ShardOptions",
    "Splits",
]
