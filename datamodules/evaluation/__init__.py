"""The data sets of the evaluation suites, as subclasses of `lit_clip.evaluation.data.ImageSet`, one class per set.

`image_files` has the bases and `annotation_files` the readers that most sets share; the other files hold sets.
"""

from datamodules.evaluation.caption_choices import (
    MMVPVLM,
    AROOrder,
    AROVisualGenome,
    SugarCrepe,
    WinoGAViL,
    Winoground,
)
from datamodules.evaluation.frame_robustness import ImageNetVidRobust, YTBBRobust
from datamodules.evaluation.imagenet import ImageNet
from datamodules.evaluation.imagenet_variants import ImageNetFolders, ImageNetV2, ObjectNet
from datamodules.evaluation.labelled_table import LabelledTable
from datamodules.evaluation.languages import XTD10, BabelImageNet, Crossmodal3600, TranslatedImageNet
from datamodules.evaluation.located_images import LocatedImages
from datamodules.evaluation.non_torchvision_sets import RESISC45, SUN, AYahoo, Birdsnap, Digits, HatefulMemes
from datamodules.evaluation.people_sets import CelebAIdentities, FairFace
from datamodules.evaluation.reading_sets import IIIT5K, SVHNNumbers
from datamodules.evaluation.retrieval_sets import COCO, CaptionedPairs, Flickr30k
from datamodules.evaluation.torchvision_arrays import CIFAR10, CIFAR100, FER2013, MNIST, STL10, PCam
from datamodules.evaluation.torchvision_objects import KITTI, VOC2007, CLEVRCounts
from datamodules.evaluation.torchvision_sets import (
    DTD,
    GTSRB,
    SUN397,
    Caltech101,
    Country211,
    EuroSAT,
    FGVCAircraft,
    Flowers102,
    Food101,
    OxfordPets,
    RenderedSST2,
    StanfordCars,
)
from datamodules.evaluation.video_sets import UCF101, Kinetics700, RareAct
from datamodules.evaluation.webdataset import WebDataset, WebDatasetCaptions, WebDatasetMultiLabel
from datamodules.evaluation.webdataset_groups import WebDatasetGroups

__all__ = [
    "AROOrder",
    "AROVisualGenome",
    "AYahoo",
    "BabelImageNet",
    "Birdsnap",
    "CIFAR10",
    "CIFAR100",
    "CLEVRCounts",
    "COCO",
    "Caltech101",
    "CaptionedPairs",
    "CelebAIdentities",
    "Country211",
    "Crossmodal3600",
    "DTD",
    "Digits",
    "EuroSAT",
    "FER2013",
    "FGVCAircraft",
    "FairFace",
    "Flickr30k",
    "Flowers102",
    "Food101",
    "GTSRB",
    "HatefulMemes",
    "IIIT5K",
    "ImageNet",
    "ImageNetFolders",
    "ImageNetV2",
    "ImageNetVidRobust",
    "KITTI",
    "Kinetics700",
    "LabelledTable",
    "LocatedImages",
    "MMVPVLM",
    "MNIST",
    "ObjectNet",
    "OxfordPets",
    "PCam",
    "RESISC45",
    "RareAct",
    "RenderedSST2",
    "STL10",
    "SUN",
    "SUN397",
    "SVHNNumbers",
    "StanfordCars",
    "SugarCrepe",
    "TranslatedImageNet",
    "UCF101",
    "VOC2007",
    "WebDataset",
    "WebDatasetCaptions",
    "WebDatasetGroups",
    "WebDatasetMultiLabel",
    "WinoGAViL",
    "Winoground",
    "XTD10",
    "YTBBRobust",
]
