"""DataComp's means over its 38 evaluation sets (Gadre et al. 2023).

Sets, metrics and groups are those of ``tasklist.yml`` and ``aggregate_scores.py`` in github.com/mlfoundations/datacomp.
Its list has two more sets, FairFace and UTKFace, which have no main metric and are in no mean.
"""

PREFIX = "datacomp_"  # of the sets in configs/evaluation/datacomp.yaml
OTHER_METRICS: dict[str, str] = {
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
ALL = "Average over 38 sets"
GROUPS: dict[str, tuple[str, ...]] = {
    "ImageNet": IMAGENET,
    "ImageNet distribution shifts": SHIFTS,
    "VTAB": VTAB,
    "Retrieval": RETRIEVAL,
    ALL: (*IMAGENET, *SHIFTS, *VTAB, *RETRIEVAL, *OTHERS),
}
