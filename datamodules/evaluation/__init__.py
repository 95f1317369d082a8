"""Data sets of the evaluation suites: functions and classes that open a split of a set.

Each returns a :class:`lit_clip.evaluation.data.ImageSet` and raises :class:`lit_clip.evaluation.data.MissingData` where
the files are not there. ``root`` is the folder of the set, or the folder that contains it. ``rules.yaml`` has the
sets that are rules, ``image_files`` the base of most and ``annotation_files`` the readers of their lists.
"""

from collections.abc import Callable

from . import rules
from .caption_choices import MMVPVLM, AROOrder, AROVisualGenome, SugarCrepe, WinoGAViL, Winoground
from .faces import FER2013, CelebAIdentities, FairFace, FERPlus
from .frame_robustness import ImageNetVidRobust, YTBBRobust
from .image_files import ImageFiles
from .imagenet import BabelImageNet, ImageNet, ImageNetFolders, ObjectNet, TranslatedImageNet
from .judged_documents import QueriesAndDocuments
from .localised_sets import COCOInstances, ImageGrids, MaskedFiles, VOCBoxes
from .own_classes import LabelledTable, LocatedImages
from .owners_layouts import IIIT5K, KITTI, VOC2007, Birdsnap, CLEVRCounts, Digits, Flowers102, StanfordCars, SVHNNumbers
from .retrieval_sets import COCO, XTD10, CaptionedPairs, Crossmodal3600, Flickr30k, GroupedPairs
from .torchvision_arrays import CIFAR10, CIFAR100, MNIST, STL10, PCam
from .video_sets import UCF101, Kinetics700, RareAct
from .webdataset import WebDataset, WebDatasetCaptions, WebDatasetGroups, WebDatasetMultiLabel

__all__ = ["AROOrder", "AROVisualGenome", "MMVPVLM", "SugarCrepe", "WinoGAViL", "Winoground"]
__all__ += ["CelebAIdentities", "FER2013", "FERPlus", "FairFace", "ImageNetVidRobust", "YTBBRobust"]
__all__ += ["BabelImageNet", "ImageNet", "ImageNetFolders", "ObjectNet", "TranslatedImageNet"]
__all__ += ["COCO", "CaptionedPairs", "Crossmodal3600", "Flickr30k", "GroupedPairs", "QueriesAndDocuments", "XTD10"]
__all__ += ["COCOInstances", "ImageGrids", "LabelledTable", "LocatedImages", "MaskedFiles", "VOCBoxes"]
__all__ += ["Birdsnap", "CLEVRCounts", "Digits", "Flowers102", "IIIT5K", "KITTI"]
__all__ += ["SVHNNumbers", "StanfordCars", "VOC2007"]
__all__ += ["CIFAR10", "CIFAR100", "Kinetics700", "MNIST", "PCam", "RareAct", "STL10", "UCF101"]
__all__ += ["WebDataset", "WebDatasetCaptions", "WebDatasetGroups", "WebDatasetMultiLabel"]
# pyright: reportUnsupportedDunderAll = false
# The sets of rules.yaml, which is read when the first of them is used.
__all__ += ["AYahoo", "Caltech101", "Country211", "DTD", "EuroSAT", "FGVCAircraft", "Food101", "GTSRB", "HatefulMemes"]
__all__ += ["ImageNetV2", "OxfordPets", "RESISC45", "RenderedSST2", "SUN", "SUN397"]


def __getattr__(name: str) -> Callable[..., ImageFiles]:
    if name not in rules.rules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return rules.opener(name)
