"""Write the tables of open_clip's models: ``python -m benchmarks.families.page [--measure] [--list]``.

``docs/evidence/open_clip_registry.md`` has what of the registry opens, and from where. ``--list`` prints what lit-clip
says to each name instead. With ``--measure`` a small model of every family is created with random weights, and the
table of the largest differences from open_clip is printed; ``docs/models.md`` has their maximum.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from benchmarks.families.families import FAMILIES, compare, small
from lit_clip.errors import InputError
from lit_clip.models.config import HuggingFaceTextConfig
from lit_clip.models.open_clip_configs import from_open_clip, model_config, open_clip_names
from lit_clip.models.registry import resolve_architecture
from lit_clip.weights.hub import tagged
from lit_clip.weights.load import load_model

DOCS = Path(__file__).parents[2] / "docs"
REGISTRY = DOCS / "evidence/open_clip_registry.md"
HEAD = """# open_clip's registry

- **Question**: which published weights of open_clip {version} does `load_model("model:tag")` open?
- **Answer**: of all {weights}, {opened} open, {refused} are refused{which}.
- **Command**: `python -m benchmarks.families.page` writes this page; with the option `list` it prints all tags.

The configurations decide; nothing is downloaded. Tests compare the page with the installed open_clip, and every
weight's name and shape with open_clip's models. [Models and weights](../models.md) has the differences of features.

Of the {names} configurations without published weights these are refused: {without}.

Most models need only their weights. These read a tokenizer, or a text encoder with its tokenizer, from the Hugging Face
hub or its cache too:

| from the hub | models |
|---|---|
"""


class Verdict(NamedTuple):
    """What lit-clip says to a model of the registry.

    Attributes:
        tags: names of its weights.
        said: "opens", or why not.
        source: what it needs from the hub beside its weights.
    """

    tags: list[str]
    said: str
    source: str


def verdict(name: str, tags: list[str]) -> tuple[str, str]:
    """Return whether a model's weights open, or why not, and what else they need from the hub."""
    try:
        listed = name in open_clip_names()
        config = from_open_clip(model_config(name), None, name) if listed else resolve_architecture(name)
        if not isinstance(config.text, HuggingFaceTextConfig):
            config = resolve_architecture(name)
            for tag in tags:
                tagged(config, get_pretrained_cfg(name, tag))  # pyright: ignore[reportArgumentType]  # a dictionary
    except InputError as error:
        return f"refused: {error}", ""
    source = config.text.tokenizer
    encoder = " (encoder)" if isinstance(config.text, HuggingFaceTextConfig) else ""
    return "opens", "" if source is None else f"{source.source}{encoder}"


def verdicts() -> dict[str, Verdict]:
    """Return what lit-clip says to each model with published weights, by its name."""
    tags: dict[str, list[str]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, []).append(tag)
    return {name: Verdict(tags[name], *verdict(name, tags[name])) for name in sorted(tags)}


def registry(models: dict[str, Verdict]) -> str:
    """Return the text of the registry's page."""
    unpublished = [name for name in open_clip_names() if name not in models]
    without = [said.removeprefix("refused: ") for name in unpublished if (said := verdict(name, [])[0]) != "opens"]
    refused = {name: model for name, model in models.items() if model.said != "opens"}
    total = sum(len(model.tags) for model in models.values())
    closed = sum(len(model.tags) for model in refused.values())
    head = HEAD.format(
        **{"weights": total, "version": open_clip.__version__, "opened": total - closed, "refused": closed},
        **{"names": len(unpublished), "without": ", ".join(without) or "none"},
        which="".join(f"; {name}: {model.said}" for name, model in refused.items()),
    )
    names: dict[str, list[str]] = {}
    for name, model in models.items():
        if model.source:
            names.setdefault(model.source, []).append(name)
    return head + "".join(f"| {source} | {', '.join(names[source])} |\n" for source in sorted(names))


def listing(models: dict[str, Verdict]) -> str:
    """Return a table of all models with their tags."""
    rows = (f"| {name} | {', '.join(model.tags)} | {model.said} | {model.source} |\n" for name, model in models.items())
    return "| model | tags | verdict | hub |\n|---|---|---|---|\n" + "".join(rows)


def measured() -> str:
    """Return the table of the families, measured now."""
    rows = ["| family | like | image | text | pixels | ids |", "|---|---|---|---|---|---|"]
    for family, weights in FAMILIES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            result = compare(folder, small(folder, weights), load_model(folder))
        ids = "equal" if result.tokens else "differ"
        cells = f"{result.image:.1e} | {result.text:.1e} | {result.pixels:.1g} | {ids}"
        rows.append(f"| {family} | {weights.partition(':')[0]} | {cells} |")
    return "\n".join(rows)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    models = verdicts()
    if "--list" in sys.argv[1:]:
        sys.stdout.write(listing(models))
    else:
        REGISTRY.write_text(registry(models), encoding="utf-8")
    if "--measure" in sys.argv[1:]:
        sys.stdout.write(f"{measured()}\n")


if __name__ == "__main__":
    main()
