"""Write a model for another tool, and read it back with that tool: the two halves of ``lit-clip export``.

The tools take seconds to import, or are optional, so functions import them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.config import HuggingFaceTextConfig, Preprocessing, height_width
from lit_clip.models.custom import CustomTextEncoder
from lit_clip.models.patches import unpacked
from lit_clip.models.preprocess import resize_size
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.tools.bands import banded
from lit_clip.tools.hub_client import without_bar
from lit_clip.weights.hugging_face import hugging_face_kind, library_name, to_hugging_face
from lit_clip.weights.hugging_face_processor import (
    image_processor,
    read_json,
    save_byte_pairs,
    save_sentence_transformers,
    save_tokenizer,
)
from lit_clip.weights.open_clip import open_clip_model
from lit_clip.weights.sources import HF_MODEL_CONFIG

TEXTS = [  # with nothing that tokenizers clean differently
    "a photo of a dog",
    "two cats",
    "a red bicycle in front of an old brick house by the sea",
    "snow on a mountain in the evening",
]
OUTPUTS = ["features", "probabilities", "none"]  # of an image encoder in ONNX; the last two with a head
PROTOBUF_LIMIT = 1.9e9  # bytes: ONNX files above 2 GiB need a second file for the weights


class ExportSample(NamedTuple):
    """Inputs that the model and its export both encode: four images of random pixels and four texts."""

    images: list[Image.Image]
    pixels: Tensor  # float ``[4, 3, H, W]`` or patch sequences, the images after the model's own preprocessing
    texts: list[str]
    tokens: Tensor  # int64 ``[4, L]``, the texts after the model's own tokenizer

    @classmethod
    def of(cls, model: CLIP) -> Self:
        """Create images that shrink by about half and have an unambiguous centre crop."""
        height, width = height_width(model.preprocessing.image_size)
        size = 4, 2 * height, 2 * width + 8, model.preprocessing.bands
        images = [banded(image) for image in np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)]
        pixels = torch.stack([model.preprocess(image) for image in images])
        return cls(images, pixels, TEXTS, model.tokenize(TEXTS))


class Reading(NamedTuple):
    """The other tool's unit features ``[4, D]`` of an :class:`ExportSample`, and its further outputs, if any."""

    image: Tensor
    text: Tensor
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    probabilities: Tensor | None = None  # of a head


class Parity(NamedTuple):
    """Largest differences between a model and its export; None for a part that the format lacks."""

    image: float  # between unit image features
    text: float  # between unit text features
    pixels: float | None  # in levels of 255, before normalisation
    tokens: bool | None  # whether the ids are equal
    head: float | None = None  # between probabilities


@torch.no_grad()
def parity_of(model: CLIP, sample: ExportSample, reading: Reading, head: Any = None) -> Parity:
    """Compare the other tool's outputs with the model's."""
    image = model.encode_image(sample.pixels, normalize=True)
    text = model.encode_text(sample.tokens, normalize=True)
    pixels = None
    if reading.pixels is not None:
        std = torch.tensor(model.preprocessing.std)
        std = std[:, None, None] if sample.pixels.ndim == 4 else std.repeat(sample.pixels.shape[2] // 3)
        pixels = float(((reading.pixels - sample.pixels) * std).abs().max()) * 255
    of_head = None
    if head is not None:
        assert reading.probabilities is not None
        of_head = float((reading.probabilities - outputs_with_head(model, sample.pixels, head)[1]).abs().max())
    return Parity(
        float((reading.image - image).abs().max()),
        float((reading.text - text).abs().max()),
        pixels,
        None if reading.tokens is None else torch.equal(reading.tokens, sample.tokens),
        of_head,
    )


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors."""
    # Without the "pt" mark transformers refuses the file.
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read


NAFLEX = "only hugging_face has NaFlex's patches"


def save_json(values: dict[str, Any], path: Path) -> None:
    """Write values as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# open_clip


def write_open_clip(model: CLIP, folder: Path) -> None:
    """Write a folder that open_clip opens as ``local-dir:FOLDER``, or from the hub once it is uploaded."""
    ours = model.preprocessing
    require(ours.bands == 3, f"open_clip's transform reads 3 bands, the model {ours.bands}; use onnx")
    require(ours.max_patches is None, f"open_clip: {NAFLEX}")
    text = model.config.text
    values = {
        "model_cfg": open_clip_model(model),
        "preprocess_cfg": {
            "size": list(height_width(ours.image_size)),
            "mode": "RGB",
            "mean": list(ours.mean),
            "std": list(ours.std),
            "interpolation": ours.interpolation,
            "resize_mode": ours.resize_mode,
            **({} if ours.crop_pct == 1 else {"crop_pct": ours.crop_pct}),
            **({} if ours.window is None else {"window": ours.window}),
        },
        # With it lit-clip needs the folder alone; open_clip reads the text encoder's settings from where it is named.
        **({HF_MODEL_CONFIG: text.model} if isinstance(text, HuggingFaceTextConfig) else {}),
    }
    save_json(values, folder / "open_clip_config.json")
    save_weights(model.state_dict(), folder / "open_clip_model.safetensors")
    if text.tokenizer is not None:
        save_tokenizer(model, folder)


@torch.no_grad()
def read_open_clip(folder: Path, sample: ExportSample) -> Reading:
    """Run open_clip as a user would: model, transform and tokenizer from the folder, and the card's centre crop."""
    import open_clip
    from torchvision.transforms import CenterCrop

    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)  # pyright: ignore[reportGeneralTypeIssues]  # a pair
    model, steps = cast(Any, model).eval(), cast(Any, preprocess).transforms
    cfg = read_json(folder / "open_clip_config.json")["preprocess_cfg"]
    if "crop_pct" in cfg:
        cropped = Preprocessing(cfg["size"], resize_mode=cfg["resize_mode"], crop_pct=cfg["crop_pct"])
        steps[0].size = resize_size(cropped)
        steps.insert(1, CenterCrop(cfg["size"]))
    tokenizer = open_clip.get_tokenizer(name)
    return Reading(
        model.encode_image(sample.pixels, normalize=True),
        model.encode_text(sample.tokens, normalize=True),
        torch.stack([cast(Any, preprocess)(image) for image in sample.images]),
        tokenizer(sample.texts),
    )


# Hugging Face


def write_hugging_face(model: CLIP, folder: Path) -> None:
    """Write a folder that transformers' model and processor classes open."""
    try:
        kind = hugging_face_kind(model.config)
        values, state = to_hugging_face(model)
        processor = image_processor(model.preprocessing, f"{library_name(kind)}ImageProcessor")
    except InputError as error:
        instead = "use open_clip or onnx" if model.preprocessing.max_patches is None else NAFLEX
        raise InputError(f"hugging_face cannot represent this model: {error}; {instead}") from error
    save_json(values, folder / "config.json")
    save_weights(state, folder / "model.safetensors")
    save_json(processor, folder / "preprocessor_config.json")
    save_tokenizer(model, folder)
    if kind == "clip":
        save_byte_pairs(folder)
    if kind != "siglip2":  # whose images sentence-transformers does not cut to patches
        save_sentence_transformers(folder)


@torch.no_grad()
def read_hugging_face(folder: Path, sample: ExportSample) -> Reading:
    """Run transformers as a user would: model and processor from the folder, without the network."""
    import transformers

    kind = read_json(folder / "config.json")["model_type"]
    model_class, processor_class = (getattr(transformers, library_name(kind) + part) for part in ("Model", "Processor"))
    with without_bar():
        model = model_class.from_pretrained(folder, local_files_only=True).eval()
        # By Pillow, as in training: torch's resampling differs from it by up to two levels.
        processor: Any = processor_class.from_pretrained(folder, local_files_only=True, backend="pil")
    images = {"pixel_values": sample.pixels}
    if kind == "siglip2":
        patches, places, valid = unpacked(sample.pixels)
        images = {"pixel_values": patches, "pixel_attention_mask": valid, "spatial_shapes": places.amax(dim=1) + 1}
    out = model(input_ids=sample.tokens, **images)
    ours = read_json(folder / "preprocessor_config.json")
    inputs = processor(
        # Its own defaults win over the file's.
        **{name: ours[name] for name in ("patch_size", "max_num_patches") if kind == "siglip2"},
        text=sample.texts,
        images=sample.images,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=sample.tokens.shape[1],
    )
    # CLIP pads with 0 here and with the end of text there; the encoder sees neither.
    tokens = inputs["input_ids"] * inputs["attention_mask"] if kind == "clip" else inputs["input_ids"]
    pixels = inputs["pixel_values"]
    if kind == "siglip2":  # without their padding, which is 0 after normalisation
        valid = inputs["pixel_attention_mask"].bool()[:, :, None]
        same = torch.equal(inputs["spatial_shapes"], images["spatial_shapes"])
        pixels = torch.where(valid, pixels, sample.pixels[:, 1:]) if same else torch.full_like(pixels, torch.inf)
        pixels = torch.cat([sample.pixels[:, :1], pixels], dim=1)
    return Reading(out.image_embeds, out.text_embeds, pixels, tokens)


# ONNX


class TracedEncoder(nn.Module):
    """One encoder as a module for tracing; the image encoder includes a head if there is one."""

    def __init__(self, model: CLIP, kind: str, head: Any = None, unit_length: bool = False) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.head = head
        self.unit_length = unit_length

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.kind == "text":
            return self.model.encode_text(x.long(), self.unit_length)
        image = self.model.encode_image
        return image(x, self.unit_length) if self.head is None else outputs_with_head(self.model, x, self.head)

    def write(self, example: Tensor, path: Path, name: str, outputs: list[str]) -> None:
        """Write an ONNX file that reads the input ``name``, for any batch size if the example has several rows."""
        image = {id(p) for p in self.model.visual.parameters()}
        weights = (p.nbytes for p in self.model.parameters() if (id(p) in image) == (self.kind == "image"))
        torch.onnx.export(
            self.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=outputs,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if len(example) > 1 else None,
            external_data=sum(weights) > PROTOBUF_LIMIT,
            verbose=False,
        )


def outputs_with_head(model: CLIP, pixels: Tensor, head: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return features ``[B, D]``, a head's probabilities ``[B, C]``, and which images show none, bool ``[B]``."""
    before, after = model.image_features(pixels)
    logits = head(before, unit(after))
    return after, head.probabilities(logits), head.none_of(logits)


def check_onnx_packages() -> None:
    """Raise :class:`InputError` unless the packages of the extra ``export`` are installed.

    Also keeps onnxruntime, which has to be imported later, from sending names and hashes of models to its makers.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # on by default since 1.29
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    require(not missing, f"onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(model: CLIP, folder: Path, head: Any = None) -> None:
    """Write ``image_encoder.onnx`` and ``text_encoder.onnx``, for any batch size, ``model.json`` and the tokenizer.

    With a :class:`lit_clip.heads.Head` the image encoder has its outputs too.
    """
    check_traceable(model, "onnx")
    sample = ExportSample.of(model)
    with_head = OUTPUTS[: 1 if head is None else 3]
    TracedEncoder(model, "image", head).write(sample.pixels[:2], folder / "image_encoder.onnx", "pixels", with_head)
    TracedEncoder(model, "text").write(sample.tokens[:2], folder / "text_encoder.onnx", "tokens", OUTPUTS[:1])
    save_json(onnx_facts(model, head), folder / "model.json")
    save_tokenizer(model, folder)


def check_traceable(model: CLIP, format: str) -> None:
    """Raise :class:`InputError` if a graph cannot hold the encoders, or their inputs."""
    require(model.preprocessing.max_patches is None, f"{format}: {NAFLEX}")
    if isinstance(model.text_encoder, CustomTextEncoder):
        where = f"{format}: the text encoder {type(model.text_encoder.encoder).__name__}"
        require(not model.text_encoder.reads_lengths, f"{where} reads its texts' lengths, which no graph can")
        known = isinstance(model.tokenizer, CLIPTokenizer)
        require(known, f"{where} has a tokenizer of its own, which {format} cannot hold")


def onnx_facts(model: CLIP, head: Any = None) -> dict[str, Any]:
    """Return facts for users of the ONNX files that the files do not contain."""
    tokenizer = model.config.text.tokenizer
    of_head = {} if head is None else {"head": {"outputs": OUTPUTS[1:], **asdict(head.facts)}}
    return of_head | {
        "image_encoder": {"input": "pixels", "type": "float32", "shape": ["batch", *model.preprocessing.shape]},
        "text_encoder": {"input": "tokens", "type": "int64", "shape": ["batch", model.context_length]},
        "output": {"name": "features", "type": "float32", "shape": ["batch", model.config.embed_dim]},
        "features": "not of unit length: divide by the Euclidean norm before comparing",
        "logits": "scale * (image features . text features) + bias",
        "scale": float(model.logit_scale.exp()),
        "bias": 0.0 if model.logit_bias is None else float(model.logit_bias),
        "preprocessing": model.config.to_dict()["preprocessing"],
        "tokenizer": {
            "file": "tokenizer.json",
            "context_length": model.context_length,
            "padding_id": model.tokenizer.pad_id,
            "cleaning": "lower" if tokenizer is None else tokenizer.clean,
            "id_replaced_by_0": getattr(model.tokenizer, "stripped_id", None),
        },
    }


OPEN = "import sys, onnxruntime as o; [o.InferenceSession(f, providers=['CPUExecutionProvider']) for f in sys.argv[1:]]"


def run_graphs(folder: Path, inputs: dict[str, tuple[str, Tensor]], batches: list[int]) -> list[list[Tensor]]:
    """Run a folder's ONNX files with onnxruntime on the CPU in batches of these sizes; return each file's outputs.

    A file's input has a name and values.
    """
    import onnxruntime

    command = [sys.executable, "-P", "-c", OPEN, *(str(folder / file) for file in inputs)]
    status = subprocess.run(command, capture_output=True, check=False).returncode
    require(status in (0, 1), f"onnx: onnxruntime crashes on opening this model (exit status {status})")  # 1: it raised
    outputs = []
    for file, (name, values) in inputs.items():
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {name: part.numpy()}) for part in values.split(batches)]
        outputs.append([torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)])
    return outputs


def read_onnx(folder: Path, sample: ExportSample) -> Reading:
    """Run onnxruntime in batches of 1 and 3."""
    inputs = {"image_encoder.onnx": ("pixels", sample.pixels), "text_encoder.onnx": ("tokens", sample.tokens)}
    (image, *of_head), (text,) = run_graphs(folder, inputs, [1, 3])
    return Reading(unit(image), unit(text), probabilities=of_head[0] if of_head else None)
