"""DataComp's means over its 38 evaluation sets (Gadre et al. 2023).

Sets, metrics and groups are those of ``tasklist.yml`` and ``aggregate_scores.py`` in github.com/mlfoundations/datacomp.
Its list has two more sets, FairFace and UTKFace, which have no main metric and are in no mean.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from lit_clip.evaluation.suite import Metric

PREFIX = "datacomp_"  # of the sets in configs/evaluation/datacomp.yaml
OTHER_METRICS: dict[str, Metric] = {
    "vtab-caltech101": "mean_per_class",
    "fgvc_aircraft": "mean_per_class",
    "vtab-flowers": "mean_per_class",
    "vtab-pets": "mean_per_class",
    "wilds-iwildcam": "macro_f1",
    "wilds-fmow": "worst_group_top1",
    "dollar_street": "worst_group_top5",
    "geode": "worst_group_top1",
    "flickr30k": "recall@1",
    "mscoco_captions": "recall@1",
    "winogavil": "jaccard",
}
IMAGENET = ("imagenet1k",)
SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
VTAB = (
    "vtab-caltech101",
    "vtab-cifar100",
    "vtab-clevr_count_all",
    "vtab-clevr_closest_object_distance",
    "vtab-dtd",
    "vtab-eurosat",
    "vtab-kitti_closest_vehicle_distance",
    "vtab-flowers",
    "vtab-pets",
    "vtab-pcam",
    "vtab-resisc45",
    "vtab-svhn",
    "sun397",
)
RETRIEVAL = ("flickr30k", "mscoco_captions", "winogavil")
OTHERS = (
    "cifar10",
    "country211",
    "fgvc_aircraft",
    "food101",
    "gtsrb",
    "mnist",
    "voc2007",
    "renderedsst2",
    "cars",
    "stl10",
    "wilds-iwildcam",
    "wilds-camelyon17",
    "wilds-fmow",
    "dollar_street",
    "geode",
)
GROUPS: dict[str, tuple[str, ...]] = {
    "ImageNet": IMAGENET,
    "ImageNet distribution shifts": SHIFTS,
    "VTAB": VTAB,
    "Retrieval": RETRIEVAL,
    "Average over 38 sets": (*IMAGENET, *SHIFTS, *VTAB, *RETRIEVAL, *OTHERS),
}


class GroupMean(NamedTuple):
    """Mean of the main metrics of a group of sets.

    Attributes:
        value: fraction; None if a set is missing.
        sets: number of sets in the group.
        missing: names of the sets without a result.
    """

    value: float | None
    sets: int
    missing: list[str]


def datacomp_means(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, GroupMean]:
    """Return DataComp's means by group, the last one over all 38 sets; {} if none of its sets is evaluated.

    Args:
        sets: ``sets`` of a ``results.json``. DataComp's have the names of ``configs/evaluation/datacomp.yaml``; one
            with another metric than DataComp's counts as missing.
    """
    names = [PREFIX + name for name in GROUPS["Average over 38 sets"]]
    values = {name: value for name in names if (value := _value(sets.get(name) or {}, name)) is not None}
    return {group: _mean(values, [PREFIX + name for name in members]) for group, members in GROUPS.items() if values}


def _mean(values: Mapping[str, float], names: list[str]) -> GroupMean:
    missing = [name for name in names if name not in values]
    return GroupMean(None if missing else fmean(values[name] for name in names), len(names), missing)


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    tasks = entry.get("tasks") or {}
    value = next(
        (tasks[task].get("value") for task in ("zero_shot", "retrieval", "caption_choice") if task in tasks), None
    )
    same_metric = entry.get("metric") == OTHER_METRICS.get(name.removeprefix(PREFIX), "top1")
    return float(value) if same_metric and isinstance(value, int | float) and math.isfinite(value) else None
