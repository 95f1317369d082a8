"""The features of images and texts, by a folder of ``lit-clip export --format onnx``; needs requirements.txt alone."""

import io
import json
import os
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import unescape
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import; without it names and hashes of models are sent
import onnxruntime  # noqa: E402

MOST_PIXELS, MOST_ELONGATED = 50_000_000, 500  # of an image, and of its longer side to the shorter
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


Encoder = Callable[[np.ndarray], Sequence[Any]]  # pixels or tokens of N images or texts -> features ``[N, D]``, more


def opened_by_onnxruntime(path: Path, threads: int) -> Encoder:
    """Open an encoder; 0 ``threads`` are one for each core of the machine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: values})


def opened_by_openvino(path: Path, threads: int) -> Encoder:
    """Open an encoder in the type that is fastest here: bfloat16 where the processor has instructions for it."""
    import openvino  # optional

    settings = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    model = openvino.compile_model(path, "CPU", settings)
    return lambda values: [*model.create_infer_request().infer({0: values}).values()]


class Model:
    """The encoders of an exported folder, with their preprocessing and tokenizer."""

    def __init__(self, folder: Path, threads: int = 0, openvino: bool = False) -> None:
        opened = opened_by_openvino if openvino else opened_by_onnxruntime
        self.facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.image_encoder = opened(folder / "image_encoder.onnx", threads)
        self.text_encoder = opened(folder / "text_encoder.onnx", threads)
        texts, self.tokenizer = self.facts["tokenizer"], Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(texts["context_length"])
        self.tokenizer.enable_padding(length=texts["context_length"], pad_id=texts["padding_id"])
        self._cached_texts = lru_cache(maxsize=64)(self._encode_texts)  # the next image mostly has the same classes

    def image(self, data: bytes) -> np.ndarray:
        """Return the unit features ``[1, D]`` of an image file."""
        return unit(self._image(data)[0])

    def by_head(self, data: bytes) -> tuple[dict[str, float], bool]:
        """Return the probability of each class of the exported head, and whether an image file shows none of them."""
        if "head" not in self.facts:
            raise ValueError("the folder has no head; it is written by lit-clip export --format onnx --head")
        _, probabilities, none = self._image(data)
        return dict(zip(self.facts["head"]["names"], probabilities[0].tolist(), strict=True)), bool(none[0])

    def _image(self, data: bytes) -> Sequence[Any]:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MOST_PIXELS or max(width, height) > MOST_ELONGATED * min(width, height):
                    raise ValueError(f"{width} x {height} pixels")
                pixels = pixels_of(image, self.facts)
        except Exception as error:  # for a broken file Pillow's decoders raise anything
            reason = "its format is none of these" if isinstance(error, Image.UnidentifiedImageError) else error
            most = f"at most {MOST_PIXELS:,} pixels, one side at most {MOST_ELONGATED} times the other"
            raise ValueError(f"the body is no image ({reason}); needs {', '.join(FORMATS)} with {most}") from error
        return self.image_encoder(pixels)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit features ``[N, D]`` of texts."""
        return self._cached_texts(tuple(texts))

    def _encode_texts(self, texts: tuple[str, ...]) -> np.ndarray:
        facts = self.facts["tokenizer"]
        tokens = np.array([self.tokenizer.encode(cleaned(text, facts["cleaning"])).ids for text in texts])
        tokens[tokens == facts["id_replaced_by_0"]] = 0
        return unit(self.text_encoder(tokens)[0])

    def probabilities(self, image: np.ndarray, texts: np.ndarray) -> list[float]:
        """Return the probability of each text: softmax, or with a bias (SigLIP) a sigmoid for each."""
        logits = self.facts["scale"] * (image @ texts.T)[0].astype(np.float64) + self.facts["bias"]
        if self.facts["bias"]:
            return (1 / (1 + np.exp(-logits))).tolist()
        exponents = np.exp(logits - logits.max())
        return (exponents / exponents.sum()).tolist()


def pixels_of(image: Image.Image, facts: dict[str, Any]) -> np.ndarray:
    """Return an image as the model reads it, float32 ``[1, 3, H, W]``."""
    want, (height, width) = facts["preprocessing"], facts["image_encoder"]["shape"][2:]
    tall, wide = int(height / want["crop_pct"]), int(width / want["crop_pct"])  # before the centre crop
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of a TIFF; as in training, the highest 8 count
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip them at 255
        raise ValueError("levels are floats or 32-bit integers, without a range; scale them to 8 or 16 bits")
    if want["resize_mode"] == "shortest" and height == width:
        tall, wide = (int(tall * side / min(image.size)) for side in (image.height, image.width))
    elif want["resize_mode"] == "shortest":
        ratio = min(image.height / tall, image.width / wide)
        tall, wide = round(image.height / ratio), round(image.width / ratio)
    image = image.resize((wide, tall), Image.Resampling[want["interpolation"].upper()])
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    image = image.convert("RGB")
    pixels = (np.asarray(image) / 255 - want["mean"]) / want["std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def cleaned(text: str, how: str) -> str:
    """Return a text as the tokenizer of the model's training got it."""
    text = unescape(unescape(ftfy.fix_text(text)))
    text = " ".join((text.translate(NO_PUNCTUATION) if how == "canonicalize" else text).split())
    return text if how == "whitespace" else text.lower()


def unit(features: Any) -> np.ndarray:
    """Return features ``[N, D]`` of length one."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)
