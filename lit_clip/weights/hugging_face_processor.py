"""Convert Hugging Face's image processors and tokenizers to our preprocessing and vocabulary, and back."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import CLIPTokenizer, byte_pair_tokenizer
from lit_clip.tools import reading

FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Defaults of their image processors, for entries that a file leaves out.
_PROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
_HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {
        **_PROCESSOR,
        "do_center_crop": True,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": Preprocessing().mean,
        "image_std": Preprocessing().std,
    },
    "SiglipImageProcessor": {
        **_PROCESSOR,
        "do_center_crop": False,
        "size": {"height": 224, "width": 224},
        **_HALVES,
    },
    "Siglip2ImageProcessor": {**_PROCESSOR, "resample": 2, "patch_size": 16, "max_num_patches": 256, **_HALVES},
}


def agree(name: str, theirs: object, ours: object) -> None:
    """Raise :class:`InputError` naming both values unless they are equal."""
    require(theirs == ours, f"{name} is {theirs} there and {ours} here; the features would differ")


def square(name: str, size: Any) -> int:
    """Return the side of a square, given as a number, or as height and width, which must be equal."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    require(height == width, f"{name} is {height} x {width}; Hugging Face's models need a square")
    return int(height)


def preprocessing_of(values: Mapping[str, Any], image_size: int | None, kind: str) -> Preprocessing:
    """Convert Hugging Face's ``preprocessor_config.json``, with the defaults of :data:`PROCESSORS`.

    The model's image size must be the file's; None: any size.
    """
    settings, same = _settings(values, kind)
    resized = settings["size"]
    if isinstance(resized, int):
        resized = {"shortest_edge": resized}
    shortest = "shortest_edge" in resized
    if shortest:
        edge = resized["shortest_edge"]
        agree("preprocessor do_center_crop", settings["do_center_crop"], True)
    else:
        edge = square("preprocessor size", (resized.get("height"), resized.get("width")))
    crop = settings["crop_size"] if settings["do_center_crop"] else edge
    crop = square("preprocessor crop_size", (crop["height"], crop["width"]) if isinstance(crop, dict) else crop)
    agree("size of a preprocessed image", crop, image_size or crop)
    require(edge >= crop, f"preprocessor size {edge} must be at least crop_size {crop}, or images get a black border")
    mode: Literal["shortest", "squash"] = "shortest" if shortest else "squash"
    return replace(same, image_size=crop, resize_mode=mode, crop_pct=_crop_pct(crop, edge))


def naflex_preprocessing(values: Mapping[str, Any], patch_size: int) -> Preprocessing:
    """Convert the ``preprocessor_config.json`` of a ``Siglip2Model`` with patches of this size."""
    settings, same = _settings(values, "Siglip2ImageProcessor")
    agree("preprocessor patch_size", settings["patch_size"], patch_size)
    return replace(same, patch_size=patch_size, max_patches=settings["max_num_patches"])


def _settings(values: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], Preprocessing]:
    """Return a file's settings with a processor's defaults, and our preprocessing from what processors share."""
    settings = {**PROCESSORS[kind], **{key: value for key, value in values.items() if value is not None}}
    for step in ("do_resize", "do_rescale"):
        agree(f"preprocessor {step}", settings[step], True)
    agree("preprocessor rescale_factor", round(1 / settings["rescale_factor"], 3), 255)
    resample = settings["resample"]
    require(resample in FILTERS, f"preprocessor resample is {resample}; must be 2 (bilinear) or 3 (bicubic)")
    normalised = settings["do_normalize"]
    return settings, Preprocessing(
        mean=tuple(settings["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalised else (1.0, 1.0, 1.0),
        interpolation=FILTERS[resample],
        window=settings.get("window"),  # ours
    )


def _crop_pct(crop: int, edge: int) -> float:
    """Return ``r`` such that ``floor(crop / r)`` is exactly ``edge`` in floating point."""
    ratio = crop / edge
    return ratio if math.floor(crop / ratio) == edge else math.nextafter(ratio, 0)


def image_processor(ours: Preprocessing, kind: str) -> dict[str, Any]:
    """Convert our preprocessing to Hugging Face's ``preprocessor_config.json`` of a ``kind`` in :data:`PROCESSORS`."""
    shared = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "resample": {name: number for number, name in FILTERS.items()}[ours.interpolation],
        "image_mean": list(ours.mean),
        "image_std": list(ours.std),
        **({} if ours.window is None else {"window": ours.window}),
    }
    if kind == "Siglip2ImageProcessor":
        return {**PROCESSORS[kind], **shared, "patch_size": ours.patch_size, "max_num_patches": ours.max_patches}
    size = square("preprocessing.image_size", ours.image_size)
    edge = math.floor(size / ours.crop_pct)
    shortest = ours.resize_mode == "shortest"
    return {
        **PROCESSORS[kind],
        **shared,
        "do_center_crop": shortest or edge != size,
        "size": {"shortest_edge": edge} if shortest else {"height": edge, "width": edge},
        "crop_size": {"height": size, "width": size},
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise :class:`InputError` for anything else."""
    values = reading.read_json(path)
    require(isinstance(values, dict), f"{path}: not a JSON object")
    return values


def check_vocabulary(folder: Path) -> None:
    """Raise :class:`InputError` unless a CLIPModel's tokenizer, if any, has CLIP's vocabulary."""
    if (folder / "vocab.json").is_file():
        name, theirs = "vocab.json", read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        name, theirs = "tokenizer.json", read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    else:
        return
    ours = byte_pairs()[0]
    wrong = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (theirs, ours))
        raise InputError(f"{name} is not CLIP's vocabulary: {wrong[0]!r} is {there} there and {here} here")


def byte_pairs() -> tuple[dict[str, int], list[Any]]:
    """Return CLIP's vocabulary (token to id) and its merges (pairs of strings)."""
    model = json.loads(byte_pair_tokenizer().to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def save_tokenizer(model: CLIP, folder: Path) -> None:
    """Write the model's tokenizer as files that transformers opens.

    Theirs splits and lower-cases as ours does, but neither fixes broken Unicode and ligatures nor undoes HTML escapes:
    such texts get other ids.
    """
    import transformers  # takes seconds

    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, CLIPTokenizer):
        vocab, merges = byte_pairs()
        transformers.CLIPTokenizer(
            vocab=vocab, merges=merges, model_max_length=tokenizer.context_length
        ).save_pretrained(folder)
        return
    definition = Tokenizer.from_str(tokenizer.definition)
    pad = definition.id_to_token(tokenizer.pad_id)
    stripped = {} if tokenizer.stripped_id is None else {"sep_token": definition.id_to_token(tokenizer.stripped_id)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=definition,
        pad_token=pad,
        **stripped,
        model_max_length=tokenizer.context_length,
        padding_side="right",  # SigLIP 2's class there pads at the left without this
        # SigLIP's encoder attends to padding: passing a mask on to it would change the features.
        model_input_names=["input_ids"] if tokenizer.whole else ["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def save_byte_pairs(folder: Path) -> None:
    """Write CLIP's vocabulary in the files that older transformers releases and other tools read."""
    byte_pair_tokenizer().model.save(str(folder))


def save_sentence_transformers(folder: Path) -> None:
    """Write the files with which sentence-transformers (5.4 or newer) opens the folder, for unit features."""
    parts = {"": "Transformer", "normalize": "Normalize"}
    kinds = [(path, f"sentence_transformers.models.{name}") for path, name in parts.items()]
    settings = {
        "modality_config": {
            kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
            for kind in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
        "processor_kwargs": {"backend": "pil"},  # as in training
        "processing_kwargs": {"text": {"padding": "max_length", "truncation": True}},  # SigLIP attends to padding
    }
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
    (folder / "normalize").mkdir()
    values = {"modules.json": modules, "sentence_bert_config.json": settings, "normalize/config.json": {}}
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
