"""Prompts of a set's classes, and the zero-shot classifier that a text encoder makes from them.

Class names and templates come from named lists: ``paper:Food101`` (the paper's own, in ``paper_prompts.json``, which
refers to an installed package that has the same list), ``clip_benchmark:flowers`` or ``imagenet``; or from the user.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.embedding.parts import load_arrays, save_arrays
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import LabelledImages, Localised
from lit_clip.evaluation.suite import ClassNames, SuiteEntry, as_text
from lit_clip.evaluation.zero_shot import IMAGENET, check_templates, ensemble, imagenet_class_names, imagenet_templates
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import text_sha256
from lit_clip.tools.atomic import make_folder
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.own_files import installed_file
from lit_clip.tools.reading import read_json, read_yaml
from lit_clip.tools.untrusted import shortened

DEFAULT_TEMPLATES = ("a photo of a {}.",)
PAPER, PACKAGE = "paper:", "clip_benchmark:"
FILES = (".yaml", ".yml", ".json")
METHOD = "ensemble 1"  # part of the cache key: increase the number when the arithmetic changes


@dataclass(frozen=True)
class Prompts:
    """Display name and one or more prompts for each of C classes, in label order.

    ``alternatives`` are the numbers of names of the classes, which have equally many prompts each, one after the other;
    empty: one name each.
    """

    names: list[str]
    texts: list[list[str]]
    alternatives: tuple[int, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Prompts":
        """Return the prompts of classes that each have one text, which is also the name."""
        names = list(texts)
        return cls(names, [[text] for text in names])

    @property
    def sha256(self) -> str:
        """Hash of the texts, the same in every process."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def by_name(self) -> "tuple[Prompts, list[int]]":
        """Return separate prompts for each name of the classes, and the class of each name."""
        names, texts, classes = list[str](), list[list[str]](), list[int]()
        for label, (name, own) in enumerate(zip(self.names, self.texts, strict=True)):
            count = self.alternatives[label] if self.alternatives else 1
            share = len(own) // count
            texts += [own[place * share : (place + 1) * share] for place in range(count)]
            names += [name] * count
            classes += [label] * count
        return Prompts(names, texts), classes


@dataclass
class _Classes:
    """A list of classes in its source's order; errors call the source ``where``."""

    where: str
    names: list[list[str]]  # of each class; its prompts if whole_prompts
    display: list[str] = field(default_factory=list)  # name of each class; by default the first of its names
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names that a set may have for a display name
    in_label_order: bool = False  # whether the order is meant to be the set's label order
    whole_prompts: bool = False
    by_name: bool = False  # whether classes can only be matched by name: the order is no dataset's
    templates: list[str] | None = None  # from the same file

    def __post_init__(self) -> None:
        self.display = self.display or [names[0] for names in self.names]


def prompts_of(class_names: ClassNames, templates: str | list[str] | None, own_names: Sequence[str]) -> Prompts:
    """Build the prompts of a set.

    Args:
        class_names: None for the set's own; ``paper:NAME``, ``clip_benchmark:NAME`` or ``imagenet``, which are put into
            the set's order if its names differ only in spelling; a list in label order, whose elements are a name or
            several names of a class; a mapping from classes to whole prompts; or a YAML file of such a list or
            mapping, or of both ``classes`` and ``templates``.
        templates: None for those in the file of ``class_names``, or else ``a photo of a {}.``; a named list or a YAML
            file as above; one template; or a list of templates.
        own_names: the set's own class names, in label order.
    """
    classes = _align(_classes(class_names, own_names), own_names)
    if classes.whole_prompts:
        require(templates is None, f"templates: {classes.where} has whole prompts; leave the templates out")
        return Prompts(classes.display, classes.names)
    chosen = (classes.templates or list(DEFAULT_TEMPLATES)) if templates is None else templates_of(templates)
    texts = [[template.replace("{}", name) for name in names for template in chosen] for names in classes.names]
    counts = tuple(map(len, classes.names))
    return Prompts(classes.display, texts, counts if max(counts) > 1 else ())


def prompts_of_set(entry: SuiteEntry, images: LabelledImages | Localised) -> Prompts:
    """Build a set's prompts as its suite defines them; the set itself may provide templates and synonyms."""
    templates = entry.templates or getattr(images, "templates", None)
    synonyms = None if entry.class_names else getattr(images, "synonyms", None)
    prompts = prompts_of(entry.class_names or synonyms, templates, images.class_names)
    return replace(prompts, names=list(images.class_names)) if synonyms else prompts


def templates_of(templates: str | Sequence[str], where: str = "templates") -> list[str]:
    """Return the prompt templates of a named list, a YAML file, a single template or a list; see :func:`prompts_of`."""
    if isinstance(templates, str):
        file = templates.endswith(FILES) and "{}" not in templates
        templates, where = _templates(templates, where), f"{where}: {templates}" if file else where
    check_templates(templates, where)
    return list(templates)


def _templates(name: str, where: str) -> list[str]:
    if "{}" in name:
        return [name]
    named = _named(name, "templates", where)
    if named is not None:
        return named
    require(name.endswith(FILES), f"{where}: {shortened(name)} has no {{}} and is neither {PAPER}NAME nor a YAML file")
    value = read_yaml(name, where)
    listed = value.get("templates") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{where}: {name}: must be a list of templates, or a mapping with one")
    return [as_text(template, f"{where}: {name}") for template in listed]


def _named(name: str, part: str, where: str) -> list[Any] | None:
    """Return the ``classes`` or ``templates`` of a named list; None for any other text."""
    if name == IMAGENET:
        return imagenet_class_names() if part == "classes" else imagenet_templates()
    if name.startswith(PACKAGE):
        name, lists = name.removeprefix(PACKAGE), _package(part)
        require(name in lists, f"{where}: clip-benchmark has no {name!r}; it has {', '.join(lists)}")
        return [text.replace("{c}", "{}") for text in lists[name]]
    if name.startswith(PAPER):
        name = name.removeprefix(PAPER)
        require(name in _paper(), f"{where}: the paper has no {name!r}; it has {', '.join(_paper())}")
        value = _paper()[name][part]
        return _named(value, part, where) if isinstance(value, str) else value
    return None


def _classes(spec: ClassNames, own_names: Sequence[str]) -> _Classes:
    if spec is None:
        return _Classes("the set", [[name] for name in own_names], in_label_order=True)
    if not isinstance(spec, str):
        return _listed(spec, "class_names")
    named = _named(spec, "classes", "class_names")
    if named is not None:
        entry = _paper()[spec.removeprefix(PAPER)] if spec.startswith(PAPER) else {}
        options = {key: entry[key] for key in ("aliases", "by_name") if key in entry}
        names = [[name] if isinstance(name, str) else name for name in named]  # clip-benchmark's may be empty
        return _Classes(spec, names, **options)
    require(
        spec.endswith(FILES),
        f"class_names: {spec!r} must be {IMAGENET}, {PAPER}NAME, {PACKAGE}NAME or a YAML file",
    )
    value = read_yaml(spec, "class_names")
    if isinstance(value, dict) and value.keys() == {"classes", "templates"}:
        classes = _listed(value["classes"], f"class_names: {spec}")
        classes.templates = templates_of(value["templates"], f"class_names: {spec}: templates")
        return classes
    return _listed(value, f"class_names: {spec}")


def _listed(value: Any, where: str) -> _Classes:
    """Read a list of names, a list with several names per class, or a mapping from classes to prompts."""
    require(isinstance(value, list | dict) and bool(value), f"{where}: must be a list or a mapping of classes")
    names = []
    for element in value.values() if isinstance(value, dict) else value:
        names.append([as_text(name, where) for name in (element if isinstance(element, list) else [element])])
        require(bool(names[-1]), f"{where}: a class has no name")
    if isinstance(value, dict):
        return _Classes(where, names, [as_text(name, where) for name in value], whole_prompts=True)
    return _Classes(where, names, in_label_order=True)


def _without_spelling(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _align(classes: _Classes, own_names: Sequence[str]) -> _Classes:
    """Reorder the classes into the set's label order."""
    where, size = classes.where, len(classes.names)
    if size != len(own_names):
        hint = "; give one per class, in label order" if classes.in_label_order else ""
        raise InputError(f"{where}: {size} class names, but the set has {len(own_names)} classes{hint}")
    place = {_without_spelling(name): number for number, name in enumerate(classes.display)}
    place |= {_without_spelling(alias): place[_without_spelling(name)] for alias, name in classes.aliases.items()}
    order = [place.get(_without_spelling(name), -1) for name in own_names]
    if sorted(order) != list(range(size)):  # the set numbers its classes or has other names for them
        missing = next((name for name, number in zip(own_names, order, strict=True) if number < 0), own_names[0])
        wrong = f"{where}: the set's class {missing!r} is not in the list, whose order is not the set's"
        require(not classes.by_name, wrong)
        return classes
    if classes.in_label_order:
        wrong = f"{where}: the set's class names in another order, so labels would be mixed up; keep the set's order"
        require(order == list(range(size)), wrong)
        return classes
    names, display = ([values[number] for number in order] for values in (classes.names, classes.display))
    return replace(classes, names=names, display=display)


@lru_cache(maxsize=1)
def _paper() -> dict[str, dict[str, Any]]:
    return read_json(Path(__file__).with_name("paper_prompts.json"))["sets"]


def paper_class_names(name: str) -> list[str]:
    """Return the paper's own class names for a set that has them, such as CIFAR100."""
    return list(_paper()[name]["classes"])


@lru_cache(maxsize=2)
def _package(part: str) -> dict[str, list[str]]:
    file = {"classes": "en_classnames.json", "templates": "en_zeroshot_classification_templates.json"}[part]
    return read_json(installed_file("clip_benchmark", "clip-benchmark", f"datasets/{file}"), part)


@torch.no_grad()
def text_classifier(
    model: CLIP,
    prompts: Prompts,
    cache: Path | None = None,
    *,
    weights: str | None = None,
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Load or compute the :func:`lit_clip.evaluation.zero_shot.ensemble` of prompts; all ranks share the work.

    Args:
        model: model on the device to compute on.
        prompts: prompts of C classes.
        cache: folder of built classifiers, keyed by the text tower's weights and the tokens.
        weights: :func:`text_sha256` of the model, or another name of its weights, if known.
        batch_size: prompts encoded at once.
        progress: called after each batch with the number of prompts that this process has encoded.
    """
    require(bool(prompts.texts) and all(prompts.texts), "prompts: there are no classes, or a class has no prompt")
    counts = [len(texts) for texts in prompts.texts]
    tokens = model.tokenizer([text for texts in prompts.texts for text in texts])  # [P, L]
    path = None if cache is None else cache / f"{_cache_key(model, tokens, counts, weights)}.npz"
    first = distributed.rank_and_world()[0] == 0
    if path is not None:
        loaded = load_arrays(path, METHOD, lambda arrays: arrays["classifier"]) if first else None
        (stored,) = distributed.gather_objects([loaded] if first else [])
        if stored is not None:
            return torch.from_numpy(np.ascontiguousarray(stored)).to(model.device)
    # In the memory layout of a loaded classifier: with another one, products with it would be rounded differently.
    classifier = ensemble(model, tokens, counts, batch_size, progress, ranks=True).contiguous()
    if path is not None:
        reasons: list[str] = []
        try:
            if first:
                make_folder(path.parent)
                save_arrays(path, METHOD, {"classifier": classifier.float().cpu().numpy()})
        except InputError as error:
            reasons.append(str(error))
        for reason in distributed.gather_objects(reasons):
            raise InputError(reason)  # on all ranks or on none
    return classifier


def _cache_key(model: CLIP, tokens: Tensor, counts: Sequence[int], weights: str | None) -> str:
    device = model.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "as the weights"
    parts = (METHOD, weights or text_sha256(model), device, str(precision), list(counts), list(tokens.shape))
    return hex_digest([parts, tokens.contiguous().numpy().tobytes()])
