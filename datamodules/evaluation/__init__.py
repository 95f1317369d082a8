"""Data sets of the evaluation suites: functions and classes that open a split of a set.

Each returns a :class:`lit_clip.evaluation.data.ImageSet` and raises :class:`lit_clip.evaluation.data.MissingData` where
the files are not there. ``root`` is the folder of the set, or the folder that contains it. ``rules.yaml`` has the
sets that are rules, ``image_files`` the base of most and ``annotation_files`` the readers of their lists.
"""

from .boxed_files import COCOInstances, VOCBoxes
from .caption_choices import MMVPVLM, AROOrder, AROVisualGenome, SugarCrepe, WinoGAViL, Winoground
from .faces import FER2013, CelebAIdentities, FairFace, FERPlus
from .frame_robustness import ImageNetVidRobust, YTBBRobust
from .grouped_pairs import GroupedPairs
from .image_grids import ImageGrids
from .imagenet import ImageNet, ImageNetFolders, ObjectNet
from .judged_documents import QueriesAndDocuments
from .labelled_table import LabelledTable, LocatedImages
from .languages import XTD10, BabelImageNet, Crossmodal3600, TranslatedImageNet
from .masked_files import MaskedFiles
from .non_torchvision_sets import IIIT5K, Birdsnap, Digits, SVHNNumbers
from .retrieval_sets import COCO, CaptionedPairs, Flickr30k
from .rules import (
    DTD,
    GTSRB,
    RESISC45,
    SUN,
    SUN397,
    AYahoo,
    Caltech101,
    Country211,
    EuroSAT,
    FGVCAircraft,
    Food101,
    HatefulMemes,
    ImageNetV2,
    OxfordPets,
    RenderedSST2,
)
from .torchvision_arrays import CIFAR10, CIFAR100, MNIST, STL10, PCam
from .torchvision_sets import KITTI, VOC2007, CLEVRCounts, Flowers102, StanfordCars
from .video_sets import UCF101, Kinetics700, RareAct
from .webdataset import WebDataset, WebDatasetCaptions, WebDatasetGroups, WebDatasetMultiLabel

__all__ = ["AROOrder", "AROVisualGenome", "MMVPVLM", "SugarCrepe", "WinoGAViL", "Winoground"]
__all__ += ["CelebAIdentities", "FER2013", "FERPlus", "FairFace"]
__all__ += ["ImageNetVidRobust", "YTBBRobust"]
__all__ += ["ImageNet", "ImageNetFolders", "ImageNetV2", "ObjectNet"]
__all__ += ["LabelledTable", "LocatedImages"]
__all__ += ["GroupedPairs", "QueriesAndDocuments"]
__all__ += ["BabelImageNet", "Crossmodal3600", "TranslatedImageNet", "XTD10"]
__all__ += ["AYahoo", "Birdsnap", "Digits", "HatefulMemes", "IIIT5K", "RESISC45", "SUN", "SVHNNumbers"]
__all__ += ["COCO", "CaptionedPairs", "Flickr30k"]
__all__ += ["CIFAR10", "CIFAR100", "MNIST", "PCam", "STL10"]
__all__ += ["CLEVRCounts", "Caltech101", "Country211", "DTD", "EuroSAT", "FGVCAircraft", "Flowers102"]
__all__ += ["Food101", "GTSRB", "KITTI", "OxfordPets", "RenderedSST2", "SUN397", "StanfordCars", "VOC2007"]
__all__ += ["COCOInstances", "ImageGrids", "MaskedFiles", "VOCBoxes"]
__all__ += ["Kinetics700", "RareAct", "UCF101"]
__all__ += ["WebDataset", "WebDatasetCaptions", "WebDatasetGroups", "WebDatasetMultiLabel"]
