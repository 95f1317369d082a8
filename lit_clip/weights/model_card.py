"""The README.md of exported weights: facts, and how to open them."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from lit_clip.errors import one_printable_line
from lit_clip.models.clip import CLIP
from lit_clip.models.config import HuggingFaceTextConfig
from lit_clip.models.preprocess import resize_size
from lit_clip.tools.html import render
from lit_clip.tools.weight_files import is_path
from lit_clip.version import __version__
from lit_clip.weights.export import Parity
from lit_clip.weights.formats import FORMATS, OnnxDType, tolerance_of
from lit_clip.weights.hugging_face import hugging_face_kind, library_name

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


class ExportedSource(NamedTuple):
    """Name of an export's source, and its file's SHA-256; None for a model from the hub or a registry."""

    name: str
    sha256: str | None


def model_card(
    model: CLIP,
    format: str,
    name: str,
    source: ExportedSource,
    parity: Parity,
    license: str | None,
    repository: str | None = None,
    dtype: OnnxDType = "float32",
) -> str:
    """Return the card of an export as Markdown, with the front matter that model hubs read.

    ``format`` is a key of :data:`lit_clip.weights.formats.FORMATS`; the ``name`` is the folder's; no ``license`` is an
    unknown one. The card's code opens the model from the ``repository`` ``org/name`` on the hub, if given.
    """
    library = FORMATS[format].library
    front = {"library_name": library, "pipeline_tag": "zero-shot-image-classification", "tags": ["clip"]}
    if license:
        front["license"] = license
    config = json.loads(json.dumps(model.config.to_dict()))  # tuples as lists
    config["text"].pop("model", None)  # pages long, and in the exported configuration too
    for part in (config["text"], config["text"].get("tokenizer") or {}):
        for key in {"hugging_face", "source"} & part.keys():
            part[key] = Path(part[key]).name if is_path(part[key]) else part[key]  # a folder of this machine
    details = yaml.safe_dump(config, sort_keys=False)
    text, name = model.config.text, one_printable_line(name)
    card = render(
        TEMPLATE,
        front=yaml.safe_dump(front, sort_keys=False),
        title=repository.rpartition("/")[2] if repository else name,
        library=library,
        facts=_facts(model, format, source, parity, license, dtype),
        repository=repository,
        format=format,
        place=_place(format, name, repository).replace("\\", "\\\\").replace('"', '\\"'),
        want=model.preprocessing,
        larger=resize_size(model.preprocessing),
        kind=library_name(hugging_face_kind(model.config)) if format == "hugging_face" else None,
        embed_dim=model.config.embed_dim,
        text_source=text.hugging_face if isinstance(text, HuggingFaceTextConfig) else None,
        clean=None if text.tokenizer is None else text.tokenizer.clean,
        fence=_more_ticks(details, 3),  # no line in the details ends their block
        details=details,
    )
    return f"{card}\n"


def _facts(
    model: CLIP, format: str, source: ExportedSource, parity: Parity, license: str | None, dtype: OnnxDType
) -> dict[str, str]:
    total = sum(p.numel() for p in model.parameters())
    image = sum(p.numel() for p in model.visual.parameters())
    digest = f", SHA-256 `{source.sha256}`" if source.sha256 else ""
    measured = [f"image features {parity.image:.1e}", f"text features {parity.text:.1e}"]
    tested = "" if parity.pixels is None else "; preprocessing within one of 255 levels"
    tested += "" if parity.tokens is None else f"{',' if tested else ';'} token ids equal"
    return {
        "exported from": f"{_code(source.name)}{digest}",
        "by": f"lit-clip {__version__}",
        "licence of the weights": license or "unknown",
        "parameters": f"{total:,} (image encoder {image:,})",
        "weights": dtype,
        "embedding": f"{model.config.embed_dim} channels",
        "logit scale": f"{float(model.logit_scale.exp()):.4f}",
        **({} if model.logit_bias is None else {"logit bias": f"{float(model.logit_bias):.4f}"}),
        "largest difference from the original": f"{', '.join(measured)} (unit length, tolerance "
        f"{tolerance_of(format, dtype):.0e}){tested}",
    }


def _place(format: str, name: str, repository: str | None) -> str:
    """Return where the card's code finds the model: on the hub, or in the folder above it."""
    if format == "open_clip":
        return f"hf-hub:{repository}" if repository else f"local-dir:{name}"
    if repository is None:
        return name
    return repository.rpartition("/")[2] if format in ("onnx", "immich") else repository


def _code(text: str) -> str:
    """Return text as code for a Markdown table cell; the text can end neither the code nor the cell."""
    text = one_printable_line(text).replace("|", "\\|")
    ticks = _more_ticks(text, 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _more_ticks(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
