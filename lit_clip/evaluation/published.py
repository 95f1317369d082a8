"""What the paper publishes, to stand beside one's own figures.

The figures are data, in ``published.yaml`` with their tables and with what could not be checked.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, VisionTransformerConfig, height_width
from lit_clip.models.registry import papers_models, resolve_architecture
from lit_clip.tools.text_files import read_yaml

PAPER = "Radford et al. 2021"
PARAMETERS = {  # of all, millions; as `lit-clip models` counts them
    "RN50": 102.01,
    "RN101": 119.69,
    "RN50x4": 178.30,
    "RN50x16": 290.98,
    "RN50x64": 623.26,
    "ViT-B-32": 151.28,
    "ViT-B-16": 149.62,
    "ViT-L-14": 427.62,
    "ViT-L-14-336": 427.94,
}


class Published(NamedTuple):
    """A figure that somebody published.

    Attributes:
        value: a fraction, as in our results.
        verified: whether a source for it was at hand.
        source: where it stands: ``Radford et al. 2021, table 11``.
    """

    value: float
    verified: bool
    source: str


class NearestModel(NamedTuple):
    """One of the paper's models, and why it stands beside another: ``the same architecture``, say."""

    name: str
    rule: str


class _Figures(NamedTuple):
    """Figures by what :func:`_key` makes of a set's name, and by task, model and metric."""

    papers: dict[tuple[str, str, str], dict[str, Published]]
    measured: dict[tuple[str, str, str], dict[str, Published]]
    peers: dict[tuple[str, str], dict[str, dict[str, Published]]]
    canonical: dict[str, str]


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("published.yaml"))


@lru_cache(maxsize=1)
def _figures() -> _Figures:
    data = _data()
    canonical = {_key(alias): _key(name) for name, aliases in data["aliases"].items() for alias in aliases}
    figures = _Figures({}, {}, {}, canonical)
    for name, task, model, metric, figure in _cells(data):
        figures.papers.setdefault((_key(name), task, model), {})[metric] = figure
    for values in figures.papers.values():
        if {"pm0", "pm10"} <= values.keys():
            both = values["pm0"], values["pm10"]
            mean = round((both[0].value + both[1].value) / 2, 6)
            values["pm"] = Published(mean, all(one.verified for one in both), f"{both[0].source}, mean of the two")
    for record in data["figures"]:
        for peer, name, metric, figure in _peers(record):
            figures.peers.setdefault((_key(name), record["task"]), {}).setdefault(peer, {})[metric] = figure
    measured = data["measured"]
    for name, by_metric in measured["sets"].items():
        task = "retrieval" if "recall" in next(iter(by_metric)) else "zero_shot"
        for metric, values in by_metric.items():
            for model, value in zip(measured["models"], values, strict=True):
                figure = Published(_fraction(value), True, measured["source"])
                figures.measured.setdefault((_key(name), task, model), {})[metric] = figure
    return figures


def _cells(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, Published]]:
    """Set, task, model, metric and figure of every cell of the paper's own models."""
    for table in data["tables"]:
        source = f"{PAPER}, table {table['table']}"
        for model, row in table["rows"].items():
            verified = table["verified"].get(model, [])
            for name, value in zip(table["sets"], row, strict=True):
                figure = Published(_fraction(value), verified == "all" or name in verified, source)
                yield name, table["task"], model, data["metrics"].get(name, "top1"), figure
    for record in data["figures"]:
        for name, values in record["sets"].items():
            for metric, value in values.items():
                figure = Published(_fraction(value), True, f"{PAPER}, table {record['table']}")
                yield name, record["task"], record["model"], metric, figure


def _peers(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Published]]:
    for peer, sets in record.get("peers", {}).items():
        for name, values in sets.items():
            for metric, value in values.items():
                yield peer, name, metric, Published(_fraction(value), True, f"{PAPER}, table {record['table']}")


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)


def _set(name: str) -> str:
    return _figures().canonical.get(_key(name), _key(name))


def published(name: str, task: str, model: str, metric: str | None = None) -> Published | None:
    """The paper's figure.

    Args:
        name: of the set, as the paper's tables call it.
        task: ``zero_shot``, ``linear_probe``, ``retrieval`` or ``geolocation``.
        model: one of :func:`lit_clip.models.registry.papers_models`.
        metric: which, where a set has several; None: its first.

    Returns:
        None if the paper has none.
    """
    return _one(published_metrics(name, task, model), metric)


def published_metrics(name: str, task: str, model: str) -> dict[str, Published]:
    """All figures that the paper has of a set, by metric; see :func:`published`."""
    return dict(_figures().papers.get((_set(name), task, model), {}))


def measured(name: str, task: str, model: str, metric: str | None = None) -> Published | None:
    """What open_clip measured of OpenAI's weights, with the splits and prompts of CLIP_benchmark."""
    return _one(_figures().measured.get((_set(name), task, model), {}), metric)


def _one(figures: Mapping[str, Published], metric: str | None) -> Published | None:
    return next(iter(figures.values()), None) if metric is None else figures.get(metric)


def peers(name: str, task: str) -> dict[str, dict[str, Published]]:
    """Figures of other work that stand in the same table of the paper, by whose they are and by metric."""
    return dict(_figures().peers.get((_set(name), task), {}))


def same_set(name: str, other: str) -> bool:
    """Whether two names are of the same set of the paper, letter case, punctuation and other spellings aside."""
    return bool(name) and _set(name) == _set(other)


def disagreements() -> list[str]:
    """Where the paper disagrees with itself, a line each."""
    return list(_data()["notes"])


def papers_name(model: str) -> str:
    """``ViT-L/14@336px`` of ``ViT-L-14-336``."""
    return _data()["models"].get(model, model)


def nearest_model(model: Mapping[str, Any]) -> str:
    """Which of the paper's models is nearest, by the name that open_clip gives it; see :func:`nearest`."""
    return nearest(model).name


def nearest(model: Mapping[str, Any]) -> NearestModel:
    """Which of the paper's models is nearest, and by which rule: the first of these that applies.

    1. The name is one of the paper's, tag and ``-quickgelu`` aside.
    2. The image encoder has the same sizes.
    3. The image encoder is of the same kind (ResNet or ViT) and takes the nearest amount of arithmetic.
    4. The number of parameters is nearest.

    Args:
        model: of a ``results.json``; ``name``, ``architecture`` and ``parameters`` are read, if there.
    """
    named = {_key(papers_name(name)): name for name in papers_models()}
    named |= {_key(name): name for name in papers_models()}
    name = str(model.get("name") or "").split(":")[0].removesuffix("-quickgelu")
    if _key(name) in named:
        return NearestModel(named[_key(name)], "the same name")
    image = _image_encoder(model.get("architecture"))
    theirs = {name: resolve_architecture(name).image for name in papers_models()}
    for name, encoder in theirs.items():
        if encoder == image:
            return NearestModel(name, "the same image encoder")
    if isinstance(image, ResNetConfig | VisionTransformerConfig):
        kin = {name: _arithmetic(encoder) for name, encoder in theirs.items() if type(encoder) is type(image)}
        kind = "ResNet" if isinstance(image, ResNetConfig) else "ViT"
        return NearestModel(_closest(kin, _arithmetic(image)), f"a {kind} with the nearest amount of arithmetic")
    parameters = model.get("parameters")
    if isinstance(parameters, int | float) and parameters > 0:
        return NearestModel(_closest(PARAMETERS, parameters / 1e6), "the nearest number of parameters")
    return NearestModel("ViT-B-32", "nothing is known of the model's size; the paper's smallest ViT")


def _closest(sizes: Mapping[str, float], size: float) -> str:
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / size)))


def _image_encoder(architecture: Any) -> Any:
    """None if it is none of ours."""
    if isinstance(architecture, str):
        try:
            return resolve_architecture(architecture).image
        except InputError:
            return None
    image = architecture.get("image") if isinstance(architecture, Mapping) else None
    if not isinstance(image, Mapping) or "timm" in image:
        return None
    try:
        return CLIPConfig.from_dict({"image": image, "text": {}}).image
    except (TypeError, ValueError, KeyError):  # of a version of lit-clip with other sizes
        return None


def _arithmetic(image: Any) -> float:
    """Of an image encoder, in a unit of its kind."""
    height, width = height_width(image.image_size)
    if isinstance(image, ResNetConfig):  # a stage halves the sides and doubles the channels: a block costs the same
        return sum(image.layers) * image.width**2 * height * width
    tokens = height * width / image.patch_size**2 + 1
    return image.layers * tokens * (2 * (4 + 2 * image.mlp_ratio) * image.width**2 + 4 * tokens * image.width)
