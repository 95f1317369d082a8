"""Sources of (image, caption) pairs and of labelled images."""

from datamodules.augmentation import Augmentation
from datamodules.caption_datamodule import CaptionDataModule
from datamodules.classes import ImageFolderClasses, ParquetClasses
from datamodules.no_captions import NoCaptions
from datamodules.openmoji import OpenMoji, OpenMojiClasses
from datamodules.pairs import Captions, Weighted
from datamodules.shards import ShardOptions

__all__ = [
    "Augmentation",
    "CaptionDataModule",
    "Captions",
    "ImageFolderClasses",
    "NoCaptions",
    "OpenMoji",
    "OpenMojiClasses",
    "ParquetClasses",
    "ShardOptions",
    "Weighted",
]
