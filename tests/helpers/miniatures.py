"""The sets that have a miniature, how to write each, and how to open it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules import evaluation as sets
from lit_clip.evaluation.data import LabelledImages
from tests.helpers.miniature_arrays import (
    write_cifar10,
    write_cifar100,
    write_fer2013,
    write_fer_plus,
    write_mnist,
    write_pcam,
    write_stl10,
)
from tests.helpers.miniature_files import (
    write_caltech101,
    write_clevr_counts,
    write_country211,
    write_dtd,
    write_eurosat,
    write_fgvc_aircraft,
    write_flowers102,
    write_food101,
    write_gtsrb,
    write_imagenet,
    write_kitti,
    write_oxford_pets,
    write_rendered_sst2,
    write_stanford_cars,
    write_sun397,
    write_voc2007,
)
from tests.helpers.miniature_images import Rows


@dataclass
class Miniature:
    """A set and how to write its miniature.

    Attributes:
        make: the set's class.
        write: writes the miniature below a folder.
        index: a file that lists the set's content, to be corrupted by tests; empty: there is none.
        options: arguments for so few images.
        pixels: the file with the pixels, for a set in arrays.
        torchvision: the name of torchvision's class, if it can read the miniature.
    """

    make: Callable[..., LabelledImages]
    write: Callable[[Path], Rows]
    index: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    pixels: str = ""
    torchvision: str = ""


MINIATURES = {
    "food101": Miniature(sets.Food101, write_food101, "food-101/meta/test.json", torchvision="Food101"),
    "cifar10": Miniature(sets.CIFAR10, write_cifar10, "cifar-10-batches-py/batches.meta"),
    "cifar100": Miniature(sets.CIFAR100, write_cifar100, "cifar-100-python/test"),
    "sun397": Miniature(sets.SUN397, write_sun397, "SUN397/Testing_01.txt"),
    "stanford_cars": Miniature(
        sets.StanfordCars, write_stanford_cars, "stanford_cars/devkit/cars_meta.mat", torchvision="StanfordCars"
    ),
    "fgvc_aircraft": Miniature(
        sets.FGVCAircraft,
        write_fgvc_aircraft,
        "fgvc-aircraft-2013b/data/images_variant_test.txt",
        torchvision="FGVCAircraft",
    ),
    "voc2007": Miniature(sets.VOC2007, write_voc2007, "VOCdevkit/VOC2007/Annotations/000001.xml"),
    "dtd": Miniature(sets.DTD, write_dtd, "dtd/dtd/labels/test1.txt", torchvision="DTD"),
    "oxford_pets": Miniature(
        sets.OxfordPets, write_oxford_pets, "oxford-iiit-pet/annotations/test.txt", torchvision="OxfordIIITPet"
    ),
    "caltech101": Miniature(sets.Caltech101, write_caltech101, options={"shots": 2}),
    "flowers102": Miniature(sets.Flowers102, write_flowers102, "flowers-102/setid.mat"),
    "mnist": Miniature(
        sets.MNIST, write_mnist, "MNIST/raw/t10k-labels-idx1-ubyte", pixels="MNIST/raw/t10k-images-idx3-ubyte"
    ),
    "fer2013": Miniature(sets.FER2013, write_fer2013, "fer2013/fer2013.csv", pixels="fer2013/fer2013.csv"),
    "fer_plus": Miniature(sets.FERPlus, write_fer_plus, "fer2013/fer2013new.csv", pixels="fer2013/fer2013.csv"),
    "stl10": Miniature(sets.STL10, write_stl10, "stl10_binary/test_y.bin", pixels="stl10_binary/test_X.bin"),
    "eurosat": Miniature(sets.EuroSAT, write_eurosat, options={"sampled": 6}),
    "gtsrb": Miniature(sets.GTSRB, write_gtsrb, "gtsrb/GT-final_test.csv", torchvision="GTSRB"),
    "kitti": Miniature(sets.KITTI, write_kitti, "Kitti/raw/mapping/train_rand.txt"),
    "country211": Miniature(sets.Country211, write_country211, torchvision="Country211"),
    "pcam": Miniature(
        sets.PCam,
        write_pcam,
        "pcam/camelyonpatch_level_2_split_test_y.h5",
        pixels="pcam/camelyonpatch_level_2_split_test_x.h5",
        torchvision="PCAM",
    ),
    "clevr_counts": Miniature(
        sets.CLEVRCounts, write_clevr_counts, "clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json", {"train": 3, "test": 2}
    ),
    "rendered_sst2": Miniature(sets.RenderedSST2, write_rendered_sst2, torchvision="RenderedSST2"),
    "imagenet": Miniature(sets.ImageNet, write_imagenet),
}


def open_miniature(miniature: Miniature, root: Path, split: str) -> LabelledImages:
    return miniature.make(str(root), split, **miniature.options)
