"""What the classes of a set are called in sentences, and the classifier that a text encoder makes of them.

Lists are named: ``paper:Food101`` (``paper_prompts.json``: the paper's own, which refer to an installed package where
that carries the same list), ``clip_benchmark:flowers``, ``imagenet``; or written out by the user.
"""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.suite import ClassNames
from lit_clip.evaluation.zero_shot import IMAGENET, check_templates, ensemble, imagenet_class_names, imagenet_templates
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import replacing
from lit_clip.tools.text_files import read_json, read_yaml

DEFAULT_TEMPLATES = ("a photo of a {}.",)
PAPER, PACKAGE = "paper:", "clip_benchmark:"
FILES = (".yaml", ".yml", ".json")
METHOD = "ensemble 1"  # part of what a kept classifier is found by: count up when its arithmetic changes


@dataclass(frozen=True)
class Prompts:
    """The texts that stand for classes, in label order.

    Attributes:
        names: what each of C classes is called where people read it.
        texts: all prompts of each class, any number of them: names in templates.
    """

    names: list[str]
    texts: list[list[str]]

    @property
    def sha256(self) -> str:
        """Of the texts; the same in every process."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


@dataclass
class _Classes:
    """A list of classes as its source has it.

    Attributes:
        where: what an error calls it.
        names: of each class its names, the first for display; if they are ``whole``, they are prompts.
        called: other words for a name.
        fixed: whether the user has put them in order.
        by_name: whether their order is the source's own, and that of no dataset.
        templates: those beside them in a file.
    """

    where: str
    names: list[list[str]]
    display: list[str] = field(default_factory=list)
    called: Mapping[str, str] = field(default_factory=dict)
    fixed: bool = False
    whole: bool = False
    by_name: bool = False
    templates: list[str] | None = None

    def __post_init__(self) -> None:
        self.display = self.display or [names[0] for names in self.names]


def prompts_of(class_names: ClassNames, templates: str | list[str] | None, own_names: Sequence[str]) -> Prompts:
    """The prompts of a set.

    Args:
        class_names: None: the set's own; ``paper:NAME``, ``clip_benchmark:NAME`` or ``imagenet``, which are put in the
            set's order if its names are the same but for spelling; a list in label order, of names or of several names
            a class; a mapping from classes to whole prompts; or a YAML file of one of those two, or of ``classes`` and
            ``templates``.
        templates: None: those of the file of ``class_names`` or ``a photo of a {}.``; a name or a file as above, one
            template, or a list of them.
        own_names: the set's own, in label order.

    Raises:
        InputError: a list that is not known, cannot be read, or does not belong to a set of these classes.
    """
    classes = _align(_classes(class_names, own_names), own_names)
    if classes.whole:
        require(templates is None, f"templates: {classes.where} holds whole prompts; leave the templates out")
        return Prompts(classes.display, classes.names)
    chosen = (classes.templates or list(DEFAULT_TEMPLATES)) if templates is None else templates_of(templates)
    texts = [[template.replace("{}", name) for name in names for template in chosen] for names in classes.names]
    return Prompts(classes.display, texts)


def templates_of(templates: str | Sequence[str]) -> list[str]:
    """Templates by name, of a YAML file, one, or as they are; see :func:`prompts_of`.

    Raises:
        InputError: not known, not readable, or one without ``{}``.
    """
    if isinstance(templates, str):
        templates = _templates(templates)
    check_templates(templates)
    return list(templates)


def _templates(name: str) -> list[str]:
    if "{}" in name:
        return [name]
    if name == IMAGENET:
        return imagenet_templates()
    if name.startswith(PAPER):
        value = _paper_entry(name, "templates")["templates"]
        return _templates(value) if isinstance(value, str) else value
    if name.startswith(PACKAGE):
        return [text.replace("{c}", "{}") for text in _package_list(name, "templates")]
    require(name.endswith(FILES), f"templates: {name!r} has no {{}}, and is neither {PAPER}NAME nor a YAML file")
    value = read_yaml(name, "templates")
    listed = value.get("templates") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        raise InputError(f"templates: {name}: no list of templates")
    return [_text(text, f"templates: {name}") for text in listed]


def _classes(spec: ClassNames, own_names: Sequence[str]) -> _Classes:
    if spec is None:
        return _Classes("the set", [[name] for name in own_names], fixed=True)
    if not isinstance(spec, str):
        return _written(spec, "class_names")
    if spec == IMAGENET:
        return _Classes(spec, [[name] for name in imagenet_class_names()])
    if spec.startswith(PACKAGE):
        return _Classes(spec, [[name] for name in _package_list(spec, "class_names")])
    if spec.startswith(PAPER):
        entry = _paper_entry(spec, "class_names")
        value, more = entry["classes"], {key: entry[key] for key in ("called", "by_name") if key in entry}
        names = _classes(value, own_names).names if isinstance(value, str) else _written(value, spec).names
        return _Classes(spec, names, **more)
    require(
        spec.endswith(FILES),
        f"class_names: {spec!r} is none of {IMAGENET}, {PAPER}NAME, {PACKAGE}NAME, and no YAML file",
    )
    value = read_yaml(spec, "class_names")
    if isinstance(value, dict) and value.keys() == {"classes", "templates"}:
        classes = _written(value["classes"], f"class_names: {spec}")
        classes.templates = templates_of(value["templates"])
        return classes
    return _written(value, f"class_names: {spec}")


def _written(value: Any, where: str) -> _Classes:
    """A list of names, or of several names a class, or a mapping to prompts."""
    require(isinstance(value, list | dict) and bool(value), f"{where}: neither a list nor a mapping of classes")
    words = [_words(one, where) for one in (value.values() if isinstance(value, dict) else value)]
    if isinstance(value, dict):
        return _Classes(where, words, [_text(name, where) for name in value], whole=True)
    return _Classes(where, words, fixed=True)


def _words(value: Any, where: str) -> list[str]:
    words = [_text(word, where) for word in (value if isinstance(value, list) else [value])]
    require(bool(words), f"{where}: a class has no name")
    return words


def _text(value: Any, where: str) -> str:
    """A word of a file. YAML reads some as numbers, which is no harm, and some as something else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {value!r} is not a text; put it in quotes")
    require(bool(value.strip()), f"{where}: an empty text")
    return value


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _align(classes: _Classes, own_names: Sequence[str]) -> _Classes:
    """The classes in the set's order."""
    where, size = classes.where, len(classes.names)
    if size != len(own_names):
        hint = "; give one a class, in label order" if classes.fixed else ""
        raise InputError(f"{where}: {size} class names, the set has {len(own_names)} classes{hint}")
    place = {_letters(name): number for number, name in enumerate(classes.display)}
    place |= {_letters(theirs): place[_letters(name)] for theirs, name in classes.called.items()}
    order = [place.get(_letters(name), -1) for name in own_names]
    if sorted(order) != list(range(size)):
        missing = next((name for name, number in zip(own_names, order, strict=True) if number < 0), own_names[0])
        require(not classes.by_name, f"{where}: has no {missing!r}, a class of the set, and is not in its order")
        return classes  # of a set that numbers its classes or calls them otherwise
    if classes.fixed:
        same = order == list(range(size))
        require(same, f"{where}: the set's own names in another order, so labels would be mixed up; keep its order")
        return classes
    names, display = [classes.names[number] for number in order], [classes.display[number] for number in order]
    return _Classes(where, names, display, whole=classes.whole, templates=classes.templates)


@lru_cache(maxsize=1)
def _paper() -> dict[str, dict[str, Any]]:
    return read_json(Path(__file__).with_name("paper_prompts.json"))["sets"]


def _paper_entry(spec: str, what: str) -> dict[str, Any]:
    name = spec.removeprefix(PAPER)
    require(name in _paper(), f"{what}: the paper has no {name!r}; it has {', '.join(_paper())}")
    return _paper()[name]


@lru_cache(maxsize=2)
def _package(what: str) -> dict[str, list[str]]:
    """A file of ``clip-benchmark``, which is not imported: that takes seconds, and more packages."""
    package = importlib.util.find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"{what}: this list comes with clip-benchmark; install it (lit-clip's extra eval)")
    file = {"class_names": "en_classnames.json", "templates": "en_zeroshot_classification_templates.json"}[what]
    return read_json(Path(package.submodule_search_locations[0]) / "datasets" / file, what)


def _package_list(spec: str, what: str) -> list[str]:
    name, lists = spec.removeprefix(PACKAGE), _package(what)
    require(name in lists, f"{what}: clip-benchmark has none of {name!r}; it has {', '.join(lists)}")
    return list(lists[name])


def text_sha256(model: CLIP) -> str:
    """SHA-256 of all that a model's text features depend on but the texts: weights, sizes, activation.

    A gigabyte of weights takes about a second.
    """
    said = (asdict(model.config.text), model.config.activation, model.config.embed_dim)
    digest = hashlib.sha256(repr(said).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("visual.", "logit_")):
            digest.update(f"{name} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def text_classifier(
    model: CLIP,
    prompts: Prompts,
    cache: Path | None = None,
    *,
    ranks: bool = True,
    weights: str | None = None,
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The paper's prompt ensemble in embedding space (section 3.1.4) of classes with any number of prompts each.

    See :func:`lit_clip.evaluation.zero_shot.ensemble`. The result does not depend on the number of ranks.

    Args:
        model: where it is to compute.
        prompts: of C classes.
        cache: a folder for finished classifiers, found again by the text tower's weights and the tokens; made if it is
            not there. Damaged files are made anew.
        ranks: whether all ranks ask, and so divide the work, or this process alone.
        weights: :func:`text_sha256` of the model, or another name for its weights, if it is known.
        batch_size: prompts encoded at once.
        progress: called with the number of prompts that this process has done after each batch.

    Returns:
        float32 ``[D, C]`` on the model's device, unit columns.
    """
    require(bool(prompts.texts) and all(prompts.texts), "prompts: a class without a prompt, or no class")
    counts = [len(texts) for texts in prompts.texts]
    tokens = model.tokenizer([text for texts in prompts.texts for text in texts])  # [P, L]
    first = not ranks or distributed.rank_and_world()[0] == 0
    shape = (model.config.embed_dim, len(counts))
    path = None
    if cache is not None and first:
        path = cache / f"{_digest(model, tokens, counts, weights)}.npz"
        found = _StoredClassifier.of(_load(path, shape), model.device)
    else:
        found = _StoredClassifier(torch.zeros(shape, device=model.device), False)
    if cache is not None and ranks:
        found = found.everywhere()
    if found.there:
        return found.classifier
    # In memory as a kept one is, or products with it would be rounded in another way the next time.
    classifier = ensemble(model, tokens, counts, batch_size, progress, ranks).contiguous()
    error = None
    if path is not None:
        try:
            _keep(path, classifier)
        except InputError as raised:
            error = raised
    if cache is not None and ranks and distributed.maximum(int(error is not None)):  # on all of them, or on none
        error = error or InputError("another process says why")
    if error:
        raise error
    return classifier


class _StoredClassifier(NamedTuple):
    """A classifier on the model's device, or zeros of its shape."""

    classifier: Tensor
    there: bool

    @classmethod
    def of(cls, loaded: tuple[Tensor, bool], device: torch.device) -> "_StoredClassifier":
        return cls(loaded[0].to(device), loaded[1])

    def everywhere(self) -> "_StoredClassifier":
        """The first rank's on all of them."""
        if not distributed.maximum(int(self.there)):
            return self
        return _StoredClassifier(distributed.sum_over_ranks(self.classifier, self.classifier.device), True)


def _digest(model: CLIP, tokens: Tensor, counts: Sequence[int], weights: str | None) -> str:
    device = model.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "as the weights"
    said = (METHOD, weights or text_sha256(model), device, str(precision), list(counts), list(tokens.shape))
    digest = hashlib.sha256(repr(said).encode())
    digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(path: Path, shape: tuple[int, int]) -> tuple[Tensor, bool]:
    """What was kept, or zeros: not there, or damaged (an ``.npz`` file has a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = np.ascontiguousarray(file["classifier"])  # ranks add up what lies in memory, in its order
        if values.shape == shape and values.dtype == np.float32:
            return torch.from_numpy(values), True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return torch.zeros(shape), False


def _keep(path: Path, classifier: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror})") from error
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, classifier=classifier.float().cpu().numpy())
