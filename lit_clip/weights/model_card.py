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
from lit_clip.secrets import without_secrets
from lit_clip.tools.weight_files import is_path
from lit_clip.version import __version__
from lit_clip.weights.export import Parity
from lit_clip.weights.hugging_face import hugging_face_kind, library_name
from lit_clip.weights.onnx_sizes import OnnxDType, tolerance_of

LIBRARY = {"open_clip": "open_clip", "hugging_face": "transformers", "onnx": "onnx"}
OPEN_CLIP = """\
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("{name}")
tokenizer = open_clip.get_tokenizer("{name}")
"""
OPEN_CLIP_CROP = """
from torchvision.transforms import CenterCrop

preprocess.transforms[0].size = {larger}  # open_clip leaves out crop_pct {crop_pct}
preprocess.transforms.insert(1, CenterCrop({size}))
"""
HUGGING_FACE = """\
from PIL import Image
from transformers import {kind}Model, {kind}Processor

model = {kind}Model.from_pretrained("{name}")
processor = {kind}Processor.from_pretrained("{name}", backend="pil")
options = {{"padding": "max_length", "truncation": True, "return_tensors": "pt"{more}}}
inputs = processor(text=["a photo of a dog"], images=[Image.open("photo.jpg")], **options)
logits = model(**inputs).logits_per_image
"""
ONNX = """\
import json

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

facts = json.load(open("{name}/model.json"))
want, texts = facts["preprocessing"], facts["tokenizer"]
image, (height, width) = Image.open("photo.jpg"), facts["image_encoder"]["shape"][2:]
{resize}
pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
pixels = ((pixels - want["mean"]) / want["std"]).transpose(2, 0, 1)[None].astype(np.float32)

tokenizer = Tokenizer.from_file("{name}/tokenizer.json")
tokenizer.enable_truncation(texts["context_length"])
tokenizer.enable_padding(length=texts["context_length"], pad_id=texts["padding_id"])
tokens = np.array([tokenizer.encode("a photo of a dog").ids])

image = onnxruntime.InferenceSession("{name}/image_encoder.onnx")
text = onnxruntime.InferenceSession("{name}/text_encoder.onnx")
image_features = image.run(None, {{"pixels": pixels}})[0]  # float32 [batch, {embed_dim}]
text_features = text.run(None, {{"tokens": tokens}})[0]  # neither is of unit length
"""
SQUASH = "image = image.resize((width, height), Image.Resampling.{filter})"
CROP = """\
scale = max(width / image.width, height / image.height) / want["crop_pct"]
larger = [max(least, int(side * scale)) for least, side in zip((width, height), image.size)]
image = image.resize(larger, Image.Resampling.{filter})
left, top = round((larger[0] - width) / 2), round((larger[1] - height) / 2)
image = image.crop((left, top, left + width, top + height))"""


class ExportedSource(NamedTuple):
    """The name of an export's source, and the SHA-256 of its file; None for a model from the hub or a registry."""

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

    ``format`` is a key of :data:`lit_clip.weights.export.FORMATS`; the ``name`` is the folder's; no ``license`` is an
    unknown one. The card's code opens the model from the ``repository`` ``org/name`` on the hub, if given.
    """
    front = {"library_name": LIBRARY[format], "pipeline_tag": "zero-shot-image-classification", "tags": ["clip"]}
    if license:
        front["license"] = license
    total = sum(p.numel() for p in model.parameters())
    image = sum(p.numel() for p in model.visual.parameters())
    digest = f", SHA-256 `{source.sha256}`" if source.sha256 else ""
    measured = [f"image features {parity.image:.1e}", f"text features {parity.text:.1e}"]
    tested = "" if parity.tokens is None else "; preprocessing within one of 255 levels, token ids equal"
    facts = {
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
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    config = json.loads(json.dumps(model.config.to_dict()))  # tuples as lists
    config["text"].pop("model", None)  # pages long, and in the exported configuration too
    for part in (config["text"], config["text"].get("tokenizer") or {}):
        for key in {"hugging_face", "source"} & part.keys():
            part[key] = Path(part[key]).name if is_path(part[key]) else part[key]  # a folder of this machine
    details = yaml.safe_dump(config, sort_keys=False)
    fence, name = _more_ticks(details, 3), one_printable_line(name)  # no line in the details ends their block
    title = repository.rpartition("/")[2] if repository else name
    usage, notes = _usage(model, format, name, repository), _notes(model, format)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n",
        f"A CLIP model for {LIBRARY[format]}.\n\n| | |\n|---|---|\n{rows}\n",
        f"## Usage\n\n{usage}\n{notes}",
        f"## Architecture, preprocessing, tokenizer\n\n{fence}yaml\n{details}{fence}\n",
    ]
    return without_secrets("\n".join(parts))


def _code(text: str) -> str:
    """Return text as code in a cell of a Markdown table, where it can neither end the code nor the cell."""
    text = one_printable_line(text).replace("|", "\\|")
    ticks = _more_ticks(text, 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _more_ticks(text: str, least: int) -> str:
    """Return more backticks than stand in a row in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _usage(model: CLIP, format: str, name: str, repository: str | None) -> str:
    """Return code that opens the model, from the hub or in the folder above the model's, and where to run it."""
    if repository is None:
        where = "In the folder above this one:\n\n"
    elif format == "onnx":
        name = repository.rpartition("/")[2]
        where = f"After `hf download {repository} --local-dir {name}`:\n\n"
    else:
        name, where = repository, ""
    if format == "open_clip":
        name = f"local-dir:{name}" if repository is None else f"hf-hub:{name}"
    also = f'\nOr, with lit-clip: `lit_clip.load_model("{repository}")`.\n' if repository and format != "onnx" else ""
    return f"{where}```python\n{_snippet(model, format, name)}```\n{also}"


def _snippet(model: CLIP, format: str, name: str) -> str:
    name = name.replace("\\", "\\\\").replace('"', '\\"')
    if format == "open_clip":
        crop_pct, size = model.preprocessing.crop_pct, model.preprocessing.image_size
        crop = OPEN_CLIP_CROP.format(larger=resize_size(model.preprocessing), crop_pct=crop_pct, size=size)
        return OPEN_CLIP.format(name=name) + ("" if crop_pct == 1 else crop)
    if format == "hugging_face":
        kind = hugging_face_kind(model.config)
        ours, more = model.preprocessing, ""
        if ours.max_patches is not None:  # the processor's own defaults win over the file's
            more = f', "patch_size": {ours.patch_size}, "max_num_patches": {ours.max_patches}'
        return HUGGING_FACE.format(name=name, kind=library_name(kind), more=more)
    wanted = model.preprocessing
    whole = wanted.resize_mode == "squash" and wanted.crop_pct == 1
    resize = (SQUASH if whole else CROP).format(filter=wanted.interpolation.upper())
    return ONNX.format(name=name, embed_dim=model.config.embed_dim, resize=resize)


def _notes(model: CLIP, format: str) -> str:
    if format == "open_clip":
        text = model.config.text
        note = "- open_clip reads the text encoder's configuration from `{}`, which must be reachable.\n"
        return note.format(text.hugging_face) if isinstance(text, HuggingFaceTextConfig) else ""
    if model.config.text.tokenizer is None:
        notes = [
            "Unlike CLIP's own code, `tokenizer.json` neither fixes broken Unicode and ligatures nor undoes HTML "
            "escapes: clean such texts first (`lit_clip.models.tokenizer.clean`), or they get other ids."
        ]
    else:
        notes = [
            f"`tokenizer.json` does not clean texts: clean them first as in training, with "
            f'`lit_clip.models.hf_tokenizer.clean(text, "{model.config.text.tokenizer.clean}")`, or they get other ids.'
        ]
    if format == "onnx":
        notes.append("`model.json` describes how to prepare images and texts, and how to use the features.")
        notes.append("onnxruntime from 1.29 on reports models to its makers unless `ORT_DISABLE_TELEMETRY=1` is set.")
    else:
        backend = (
            'Without `backend="pil"`, pixels differ by up to two of 255 levels from those the model was trained on.'
        )
        notes.append(backend)
        if model.preprocessing.max_patches is None:
            notes.append(
                "The centre crop of `transformers` is one pixel further left or up than PyTorch's if the long side is "
                "3, 7, 11, ... pixels longer than the short one after resizing."
            )
    return "\n".join(f"- {note}" for note in notes) + "\n"
