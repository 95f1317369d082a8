"""Published figures of the paper and its peers, for comparison.

They are in ``published.yaml`` with their tables, as are others' measurements, and a note of what was not verified.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lit_clip.models.registry import papers_models
from lit_clip.tools.reading import read_yaml

PAPER = "Radford et al. 2021"
PREFIXES = ("wds", "datacomp")  # of the names of CLIP_benchmark's and DataComp's sets
DATACOMP = "datacomp_"  # the beginning of its sets' names in a suite


class Published(NamedTuple):
    """A published figure, as a fraction."""

    value: float
    verified: bool  # whether it was checked against its source
    source: str  # such as ``Radford et al. 2021, table 11``


class NearestModel(NamedTuple):
    """One of the paper's models, and the rule that made it the nearest, such as ``the same name``."""

    name: str
    rule: str


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("published.yaml"))


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    return {_key(alias): _key(name) for name, aliases in _data()["aliases"].items() for alias in aliases}


def _set(name: str) -> str:
    return _aliases().get(_key(name), _key(name))


@lru_cache(maxsize=1)
def _figures() -> dict[tuple[str, str, str, str], dict[str, Published]]:
    """Return the figures by metric, for each kind (paper, peers or measured), set, task and model."""
    data, found = _data(), dict[tuple[str, str, str, str], dict[str, Published]]()
    kinds = (("paper", "tables", "rows"), ("peers", "tables", "peers"), ("measured", "measured", "rows"))
    for kind, tables, rows in kinds:
        for table in data[tables]:
            metrics = table.get("metrics") or [_metric(name) for name in table["sets"]]
            source, verified = table.get("source") or f"{PAPER}, table {table['table']}", table.get("verified")
            for model, row in table.get(rows, {}).items():
                for name, metric, percent in zip(table["sets"], metrics, row, strict=True):
                    if percent is None:
                        continue
                    sure = verified is None or verified.get(model) == "all" or name in verified.get(model, [])
                    for known in _measured_names(name) if kind == "measured" else [name]:
                        of_set = found.setdefault((kind, _set(known), table["task"], model), {})
                        of_set[metric] = Published(round(percent / 100, 6), sure, source)
    for values in found.values():
        if {"pm0", "pm10"} <= values.keys():
            both = values["pm0"], values["pm10"]
            mean = round((both[0].value + both[1].value) / 2, 6)
            values["pm"] = Published(mean, all(one.verified for one in both), f"{both[0].source}, mean of the two")
    return found


def _metric(name: str) -> str:
    return _data()["metrics"].get(name, "top1")


def _measured_names(name: str) -> list[str]:
    """Return the names of a set that others measured, of which some are also CLIP_benchmark's alone."""
    tar_sets = _data()["tar_sets"]
    names = [f"{prefix}_{tar_set}" for prefix in PREFIXES for tar_set in tar_sets.get(name, [name])]
    return [name, *names] if name in tar_sets else names  # CLIP_benchmark's voc2007 is not VOC2007


def published(name: str, task: str, model: str) -> dict[str, Published]:
    """Return the paper's figures for a set, by metric, its first one first; empty if it has none.

    Args:
        name: name of the set in the paper's tables.
        task: ``zero_shot``, ``linear_probe``, ``retrieval`` or ``geolocation``.
        model: one of :func:`lit_clip.models.registry.papers_models`.
    """
    return _figures().get(("paper", _set(name), task, model), {})


def measured(name: str, paper: str, task: str, weights: str) -> dict[str, Published]:
    """Return the figures that open_clip or CLIP_benchmark measured with :func:`measured_weights`, by metric.

    A set is known by its name in the ``paper``, or by its own if that is CLIP_benchmark's (``wds_vtab-cifar10``): any
    other may be called like one of the paper's without having its images.
    """
    known = paper or (name if name.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) else "")
    return _figures().get(("measured", _set(known), task, weights), {})


def measured_weights(model: Mapping[str, Any]) -> str:
    """Return the weights to compare a ``model`` of ``results.json`` with: its own, or OpenAI's for the nearest."""
    name = str(model.get("name") or "").replace("-quickgelu:", ":")
    known = any(kind == "measured" and weights == name for kind, _, _, weights in _figures())
    return name if known else nearest(model).name


def peers(name: str, task: str) -> dict[str, dict[str, Published]]:
    """Return figures of other work in the same table of the paper, by work and metric."""
    wanted = ("peers", _set(name), task)
    return {peer: figures for (*key, peer), figures in _figures().items() if tuple(key) == wanted}


def papers_sets() -> dict[str, str]:
    """Return the metric of each of the paper's 27 sets (tables 9 to 11)."""
    return {name: _metric(name) for name in _data()["tables"][0]["sets"]}


def datacomp_groups() -> dict[str, dict[str, str]]:
    """Return the metrics of the sets in each group that DataComp averages; the last group has all 38 sets."""
    data = _data()["datacomp"]
    groups = {**data["groups"], "Average over 38 sets": [*chain(*data["groups"].values()), *data["others"]]}
    return {
        f"DataComp, {group}": {DATACOMP + name: data["metrics"].get(name, "top1") for name in names}
        for group, names in groups.items()
    }


def canonical_set(name: str) -> str:
    """Return the set of :func:`papers_sets` that a name means, in any case or by an alias; empty for none."""
    return next((known for known in papers_sets() if name and _set(name) == _set(known)), "")


def disagreements() -> list[str]:
    """Return the places where the paper contradicts itself, one line each."""
    return list(_data()["notes"])


def papers_name(model: str) -> str:
    """Return the paper's name of a model, such as ``ViT-L/14@336px`` for ``ViT-L-14-336``."""
    return _data()["models"].get(model, model)


def nearest(model: Mapping[str, Any]) -> NearestModel:
    """Return the nearest of the paper's models, with open_clip's name: of the same name, or else of the nearest size.

    A name may have a tag and ``-quickgelu``. A ViT is compared with the paper's ViTs, of its patch size if there is
    one, a ResNet with its ResNets, any other model with all of them.
    """
    named = {_key(papers_name(name)): name for name in papers_models()}
    named |= {_key(name): name for name in papers_models()}
    name = str(model.get("name") or "").split(":")[0].removesuffix("-quickgelu")
    if _key(name) in named:
        return NearestModel(named[_key(name)], "the same name")
    parameters, (kind, patch) = model.get("parameters"), _kind_and_patch(model.get("architecture"))
    if not isinstance(parameters, int | float) or not parameters > 0:
        return NearestModel("ViT-B-32", "the model's size is unknown, so the paper's smallest ViT")
    sizes = {each: math.log(size * 1e6) for each, size in _data()["parameters"].items() if each.startswith(kind)}
    of_patch = [each for each in sizes if str(patch) in each.split("-")]
    closest = min(of_patch or sizes, key=lambda each: abs(sizes[each] - math.log(parameters)))
    kinds = {"": "the", "ViT": "the ViT with the", "RN": "the ResNet with the"}
    return NearestModel(closest, f"{kinds[kind]} nearest number of parameters")


def _kind_and_patch(architecture: Any) -> tuple[str, Any]:
    """Return how the paper's names of this kind of image encoder begin ("" without such a kind), and its patch size."""
    image = architecture.get("image") if isinstance(architecture, Mapping) else None
    if not isinstance(image, Mapping) or "timm" in image:
        return "", None
    if "patch_size" in image:
        return "ViT", image["patch_size"]
    return ("RN" if isinstance(image.get("layers"), list | tuple) else ""), None
