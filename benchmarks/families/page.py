"""Write the tables of open_clip's models: ``python -m benchmarks.families.page [--measure]``.

``docs/evidence/open_clip_registry.md`` lists the registry and what lit-clip says to each name. With ``--measure`` a
small model of every family is created with random weights, and the largest differences from open_clip are written
between the marks in ``docs/models.md``.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

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
REGISTRY, MODELS = DOCS / "evidence/open_clip_registry.md", DOCS / "models.md"
BEGIN, END = "<!-- python -m benchmarks.families.page --measure -->", "<!-- end -->"
HEAD = """# open_clip's registry

All {weights} published weights of open_clip {version} by model, and whether `load_model("model:tag")` opens them, as
decided from the configurations: nothing is downloaded. Made by `python -m benchmarks.families.page`; tests compare it
with the installed open_clip, and every weight's name and shape with open_clip's models. "Hub" names what is read from
the Hugging Face hub or its cache beside the weights: a tokenizer, or a text encoder with its tokenizer.
[Models and weights](../models.md) has the differences of features.

{opened} open, {refused} are refused. Of its {names} configurations without published weights these are refused:
{without}.

| model | tags | verdict | hub |
|---|---|---|---|
"""


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


def registry() -> str:
    """Return the text of the registry's page."""
    tags: dict[str, list[str]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, []).append(tag)
    unpublished = [name for name in open_clip_names() if name not in tags]
    refused = [said.removeprefix("refused: ") for name in unpublished if (said := verdict(name, [])[0]) != "opens"]
    rows, opened = [], 0
    for name in sorted(tags):
        said, source = verdict(name, tags[name])
        opened += len(tags[name]) * (said == "opens")
        rows.append(f"| {name} | {', '.join(tags[name])} | {said} | {source} |")
    total = sum(map(len, tags.values()))
    without = ", ".join(refused) or "none"
    head = HEAD.format(
        **{"weights": total, "version": open_clip.__version__, "opened": opened, "refused": total - opened},
        **{"names": len(unpublished), "without": without},
    )
    return head + "\n".join(rows) + "\n"


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
    REGISTRY.write_text(registry(), encoding="utf-8")
    if "--measure" in sys.argv[1:]:
        text = MODELS.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        MODELS.write_text(f"{before}{BEGIN}\n{measured()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
