"""The targets by name, and what one is."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.inputs import Target

MODULES = {
    "pairs": ("images", "tables", "coco", "parquet", "classes"),
    "stores": ("saved", "tars", "shard_index"),
    "indexes": ("approximate",),
    "locating": ("located",),
    "segmentation": ("masks", "boxes"),
    "features": ("feature_files", "feature_index", "score_files", "decisions", "stored_rows"),
    "weights": (*("weight_files", "checkpoints", "open_clip_folders", "open_clip_runs", "hugging_face_folders"),),
    "shards": ("sharded_checkpoints",),
    "heads": ("heads", "examples"),
    "settings": ("resumed_checkpoints",),
    "words": ("captions", "cards"),
    "evaluation": ("suites", "results", "annotations"),
    "remote": ("hub",),
}
if find_spec("starlette"):  # an extra
    MODULES["demo"] = ("demo",)
NAMES = tuple(name for names in MODULES.values() for name in names)


def find_target(name: str) -> Target:
    """Return a target by its name, or by ``file.py:name`` for one that is not in the list."""
    file, _, name = name.rpartition(":")
    if file:
        module = import_module(".".join(Path(file).with_suffix("").parts))
    else:
        module = import_module(f"{__name__}.{next(key for key, names in MODULES.items() if name in names)}")
    return getattr(module, name)
