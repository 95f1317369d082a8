"""Find and read weights: files, folders, the hub, open_clip's registry; each format is detected automatically."""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError, listed
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    ResNetConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
    differences,
)
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.open_clip_configs import from_open_clip
from lit_clip.models.registry import KEPT_POSITIONS, resolve_architecture
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.reading import reading
from lit_clip.tools.sharded_files import is_sharded
from lit_clip.tools.untrusted import check_names_nothing, shortened
from lit_clip.tools.weight_files import (
    Source,
    as_float32,
    checked_tensors,
    is_path,
    read_file,
    read_tensors,
    tensors_of,
)
from lit_clip.weights import hub
from lit_clip.weights.checkpoints import EMA_WEIGHTS, checked, checkpoint_tokenizer
from lit_clip.weights.hugging_face_processor import read_json
from lit_clip.weights.open_clip import run_architecture

LONG_CLIP_POSITIONS = "positional_embedding_res"  # the second of two tables, which no other model has
HF_MODEL_CONFIG = "hf_model_config"  # beside model_cfg in our exports, where open_clip does not look


@dataclass
class Weights:
    """Weights under our (OpenAI's, open_clip's) names, with information from their source.

    ``config`` is None if the source does not name its architecture. ``lora`` is a checkpoint's path and contents if
    ``state`` holds only the additions of a LoRA; ``has_our_names``: none has to be changed.
    """

    name: str
    state: dict[str, Tensor]
    config: CLIPConfig | None = None
    tokenizer: TextTokenizer | None = None
    lora: tuple[Path, dict[str, Any]] | None = None
    has_our_names: bool = False


def check_same(theirs: CLIPConfig, ours: CLIPConfig, name: Source, hint: str = "") -> None:
    """Raise :class:`InputError` with every difference between two architectures, and what to do about them."""
    wrong = differences(theirs, ours)
    if wrong and not hint:
        hint = "set model.architecture, to null for that of the weights"
        if any(difference.startswith("image.image_size") for difference in wrong):
            hint += ", or model.image_size to interpolate the position embedding"
    if wrong:
        raise InputError(f"{name} is of another architecture: {', '.join(wrong)}; {hint}")


def open_weights(source: Source, named: bool = False) -> Weights:
    """Find and read any source of :func:`lit_clip.load_model`; with ``named``, it need not name an architecture."""
    path, name = Path(source).expanduser(), os.fspath(source).removeprefix("hf-hub:")
    if not name:
        raise InputError("no model: its name is empty")  # as a path it would be the working folder
    if path.is_dir() and not is_sharded(path):
        return _open_folder(path)
    if path.exists():
        return _open_file(path, named)
    architecture, _, file = name.partition(":")
    if file and is_path(file) and len(architecture) > 1:  # the file may not name its architecture; C: is a drive
        config = resolve_architecture(architecture)  # first: an address, which may hold a password, has none
        weights = _open_file(hub.download_file(file) if hub.is_file(file) else Path(file).expanduser(), named=True)
        if weights.config:
            check_same(weights.config, config, weights.name, f"leave out {architecture}:, the file names its own")
        else:
            config.logit_bias |= "logit_bias" in weights.state  # open_clip's trainer can add one to any model
        return dataclasses.replace(weights, config=config, name=name)
    if hub.is_file(name):
        return dataclasses.replace(_open_file(hub.download_file(name), named), name=name)
    if is_path(source):
        return _open_file(path, named)
    if name != os.fspath(source) or ("/" in name and ":" not in name):
        return dataclasses.replace(_open_folder(hub.download(name)), name=os.fspath(source))
    if ":" in name:
        downloaded, config = hub.download_tag(name)
        return Weights(name, tensors_of(read_file(downloaded), name), config)
    raise InputError(
        f"{name}: no such file or folder, and neither org/name on the hub nor model:tag of open_clip's registry "
        "(lit-clip models --pretrained lists those)"
    )


def _open_folder(folder: Path) -> Weights:
    if (folder / "open_clip_config.json").is_file():
        found = next((folder / name for name in hub.OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
        if found is None:
            expected = ", ".join(hub.OPEN_CLIP_WEIGHTS)
            raise InputError(f"{folder}: no weights beside open_clip_config.json; expected one of {expected}")
        config = _open_clip_config(folder)
        return Weights(str(found), read_tensors(found), config)
    if (folder / "config.json").is_file():
        from lit_clip.weights.hugging_face import read_hugging_face_folder  # with all forms, which no run of ours needs

        config, state = read_hugging_face_folder(folder)
        return Weights(str(folder), state, config)
    if (last := folder / "checkpoints" / "last.ckpt").is_file():
        raise InputError(f"{folder}: a run's folder; give its checkpoint, {last}")
    files = listed(sorted(path.name for path in folder.iterdir())[:8], 20) or "nothing"
    raise InputError(f"{folder}: has neither open_clip_config.json nor config.json; found: {files}")


def _open_clip_config(folder: Path) -> CLIPConfig:
    file = folder / "open_clip_config.json"
    values = read_json(file)
    with reading(file, "open_clip configuration"):
        model = values.get("model_cfg", values)
        check_names_nothing(values, str(file))
        config = from_open_clip(model, values.get("preprocess_cfg"), str(file))
        if isinstance(config.text, HuggingFaceTextConfig) and HF_MODEL_CONFIG in values:
            config.text = dataclasses.replace(config.text, model=values[HF_MODEL_CONFIG])
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    named = config.text.tokenizer
    whole = own and getattr(config.text, "model", True) is not None
    if named is not None and not whole and is_path(named.source):
        problem = f"its text encoder or tokenizer is {shortened(named.source)}, a file or folder outside"
        raise InputError(f"{file}: {problem}; name one on the hub there")
    # Before a tokenizer's folder takes the place of the text encoder's name: only the name has its configuration.
    config = with_external_settings(config)
    text = config.text
    if own:
        if isinstance(text, HuggingFaceTextConfig):
            config.text = dataclasses.replace(text, hugging_face=str(folder))
        elif text.tokenizer is not None:
            config.text = dataclasses.replace(text, tokenizer=dataclasses.replace(text.tokenizer, source=str(folder)))
    return config


def _open_file(path: Path, named: bool) -> Weights:
    values = read_file(path)
    if "hyper_parameters" in values:
        config = resolve_architecture(checked(values, path)["hyper_parameters"]["architecture"])
        if values.get("weights") == EMA_WEIGHTS:
            warnings.warn(f"{path}: the weights are the moving average (EMA), not those of the last step", stacklevel=2)
        state = as_float32(checked_tensors(values["state_dict"], path))
        tokenizer = checkpoint_tokenizer(values, config) if "tokenizer" in values else None
        return Weights(str(path), state, config, tokenizer, (path, values) if "base" in values else None, True)
    if (path.parent / "open_clip_config.json").is_file() and path.name in hub.OPEN_CLIP_WEIGHTS:
        return Weights(str(path), tensors_of(values, path), _open_clip_config(path.parent))
    state = tensors_of(values, path)
    if LONG_CLIP_POSITIONS in state:
        state = _of_long_clip(state, path)
        return Weights(str(path), state, openai_architecture(state, path))
    # OpenAI's archives, and state dicts of models loaded by OpenAI's code, hold their sizes beside the weights.
    if "input_resolution" in state and "visual.conv1.weight" in state:
        return Weights(str(path), state, openai_architecture(state, path))
    config, origin = run_architecture(path, named) or (None, "")
    return Weights(f"{path} ({origin})" if origin else str(path), state, config)


def _of_long_clip(state: Mapping[str, Tensor], name: Source) -> dict[str, Tensor]:
    """Join Long-CLIP's tables of positions: the first, as trained by CLIP, has the first 20, the second the others."""
    first, second = state.get("positional_embedding"), state[LONG_CLIP_POSITIONS]
    if first is None or first.shape != second.shape or second.ndim != 2:
        needs = f"Long-CLIP has positional_embedding beside {LONG_CLIP_POSITIONS}, of one shape"
        raise InputError(f"{name}: weights do not fit: {needs}")
    joined = torch.cat([first[:KEPT_POSITIONS], second[KEPT_POSITIONS:]])
    others = {name: tensor for name, tensor in state.items() if name != LONG_CLIP_POSITIONS}
    return {**others, "positional_embedding": joined}


def openai_architecture(state: Mapping[str, Tensor], name: Source) -> CLIPConfig:
    """Infer an OpenAI model's architecture from the shapes of its weights; its activation is QuickGELU."""

    def blocks(prefix: str) -> int:
        return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})

    with reading(name, "file of one of OpenAI's models"):  # shapes of another model, or of none
        width = state["ln_final.weight"].shape[0]
        transformer = "visual.positional_embedding"
        pooled = transformer if transformer in state else "visual.attnpool.positional_embedding"
        positions, patches = (state[key] for key in ("positional_embedding", pooled))
        side = math.isqrt(len(patches) - 1)
        if "visual.proj" in state:
            image_width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            layers = blocks("visual.transformer.resblocks.")
            image: Any = VisionTransformerConfig(side * patch, patch, image_width, layers, image_width // 64)
        else:
            a, b, c, d = (blocks(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
            image = ResNetConfig((a, b, c, d), state["visual.conv3.weight"].shape[0], side * 32)
        vocab_size, layers = state["token_embedding.weight"].shape[0], blocks("transformer.resblocks.")
        text = TextTransformerConfig(len(positions), vocab_size, width, layers, width // 64)
        return CLIPConfig(state["text_projection"].shape[1], image, text, "quick_gelu")
