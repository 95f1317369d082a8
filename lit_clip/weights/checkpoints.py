"""Our checkpoint files: architecture, weights under OpenAI's names, a tokenizer, and the base of a LoRA."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from msgspec import Meta
from tokenizers import Tokenizer

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.external_config import find_class, how_to_import
from lit_clip.models.finetuning import Freeze
from lit_clip.models.lora import LoRA
from lit_clip.models.rates import Rates
from lit_clip.models.size import Size, TokenID
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.parts import plain
from lit_clip.tools.reading import naming, reason
from lit_clip.tools.untrusted import Count, check_names_nothing, convert, entries, from_plain
from lit_clip.tools.weight_files import Source, is_path

EMA_WEIGHTS = "exponential moving average"  # a checkpoint's ``weights`` if its state_dict is an average
_DATACLASSES: dict[str, type] = {"freeze": Freeze, "rates": Rates, "lora": LoRA}
# Where Lightning looks for settings too: older names of hyper_parameters, and what to make of them.
_OTHER_SETTINGS = ("hparams", "module_arguments", "hparams_name", "hparams_type")

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "lit_clip")

AtLeastOne = Annotated[int, Meta(ge=1)]


_PARTS = ("optimizer", "lr_scheduler", "decay", "loss")
_Values, _List = dict[str, object], list[dict[str, object]]
# The module's settings other than parts and dataclasses; lit_clip.tools.untrusted has the rules.
_SETTINGS = entries(
    {
        "pretrained": str | None,
        "image_size": Size | None,
        **dict.fromkeys(("context_length", "micro_batch_size"), AtLeastOne | None),
    }
)
# Class and settings of a part, compared on resume; see lit_clip.tools.parts.Description.
_PART = entries({"class_path": str, "init_args": _Values}, total=True)
_BASE = entries({"pretrained": str, "sha256": str}, total=True)
# See :meth:`HuggingFaceTokenizer.to_dict`.
_TOKENIZER = entries({"definition": str, "pad_id": TokenID, "stripped_id": NotRequired[TokenID]}, total=True)
# Entries beside the settings and weights: ours, and those that a run resumes from. A missing one is noticed by who
# needs it.
_OURS = entries(
    {
        "weights": str,
        "parts": entries(dict.fromkeys(_PARTS, _PART), total=True),
        "base": _BASE | None,
        **dict.fromkeys(("before", "loss"), _Values),
    }
)
RESUMED = entries(
    {
        **dict.fromkeys(("epoch", "global_step"), Count),
        "validation_due": bool,
        **dict.fromkeys(("loops", "callbacks"), _Values),
        **dict.fromkeys(("current_model_state", "averaging_state", "skipped_samples"), _Values),
        **dict.fromkeys(("optimizer_states", "lr_schedulers", "random_states"), _List),
    }
)


def typed_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the module's settings, and return the dataclasses among them; None stays None."""
    convert(settings, _SETTINGS, where)
    typed: dict[str, Any] = {}
    for name, kind in _DATACLASSES.items():
        value = settings[name]
        typed[name] = None if value is None else from_plain(kind, value, f"{where}.{name}")
    return typed


def checked(checkpoint: dict[str, Any], path: Source) -> dict[str, Any]:
    """Return the checkpoint if it has weights and an architecture, and its settings obey the rules for files.

    A LoRA's names its base where it is found now. Weights themselves are checked by
    :func:`lit_clip.weights.load.check_weights` and :func:`lit_clip.weights.load.check_finite_weights`.
    """
    hparams, state = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
    if not (isinstance(hparams, Mapping) and "architecture" in hparams and isinstance(state, dict)):
        raise InputError(
            f"{path}: not a lit-clip checkpoint (it has no weights or names no architecture); "
            "weights of other programs open with model.pretrained"
        )
    with naming(path):
        try:
            check_names_nothing(hparams, "hyper_parameters")
        except RecursionError as error:
            raise InputError("not a lit-clip checkpoint (its settings are nested too deeply)") from error
        convert(checkpoint, _OURS)
        convert(hparams, _SETTINGS, "hyper_parameters")
        for name, kind in _DATACLASSES.items():
            if hparams.get(name) is not None:
                from_plain(kind, hparams[name], name)
        config = CLIPConfig.from_dict(hparams["architecture"])
        _check_complete(checkpoint, hparams, config)
        for tower, class_path in config.own_encoders.items():
            named = f"its {tower} encoder is {class_path}"
            if class_path.partition(".")[0] in _LIBRARIES:  # whose classes take as much memory as the file says
                raise InputError(f"{named}, which is a layer of a library")
            if find_class(class_path) is None:
                raise InputError(f"{named}; {how_to_import(class_path)}")
    if "base" in checkpoint:
        checkpoint["hyper_parameters"] = {**hparams, "pretrained": _found_base(hparams.get("pretrained"), path)}
    return checkpoint


def _found_base(base: Any, checkpoint: Source) -> Any:
    """Return the place of a LoRA's base: beside its checkpoint if both have moved; it is verified later."""
    if base is None or not is_path(base) or Path(base).exists():
        return base
    beside = Path(checkpoint).parent / Path(base).name
    return str(beside) if beside.exists() else base


def _check_complete(checkpoint: Mapping[str, Any], hparams: Mapping[str, Any], config: CLIPConfig) -> None:
    """Raise :class:`InputError` if opening a checkpoint would need more than its file."""
    image, text = config.image, config.text
    for tower in ("image", "text"):
        if started := getattr(getattr(config, tower), "pretrained", False):
            raise InputError(f"hyper_parameters.architecture.{tower}.pretrained: {started!r} must be false")
    for name in hparams.keys() & _PARTS:
        raise InputError(f"hyper_parameters: may not have {name}, a part; a checkpoint holds data alone")
    for name in _OTHER_SETTINGS:  # which nobody would check
        if name in checkpoint and (name != "hparams_name" or checkpoint[name] not in (None, "kwargs")):
            raise InputError(f"may not have {name}; its settings are hyper_parameters")
    if hparams.get("pretrained") is not None and "base" not in checkpoint:
        raise InputError("hyper_parameters.pretrained: only a LoRA's checkpoint has a base")
    if text.tokenizer is not None and checkpoint.get("tokenizer") is None:
        raise InputError("holds no tokenizer")
    if getattr(text, "model", {}) is None:
        raise InputError("holds no configuration of its text encoder")
    if isinstance(image, TimmConfig) and image.on_hub and image.model is None:
        raise InputError("holds no configuration of its image encoder")


def saved_settings(
    model: CLIP, settings: Mapping[str, Any], sizes: Mapping[str, Any], base: Source | None
) -> dict[str, Any]:
    """Return a checkpoint's settings as plain values; for a LoRA, also its base and how it was resized."""
    values = {name: value and plain(dataclasses.asdict(value)) for name, value in settings.items()}
    values |= dict(sizes) if base else dict.fromkeys(sizes)
    if base is not None and Path(base).exists():  # otherwise the name of published weights
        base = Path(base).resolve()
    return values | {"architecture": model.config.to_dict(), "pretrained": base and str(base)}


def saved_tokenizer(model: CLIP) -> dict[str, Any]:
    """Return a checkpoint's entry for a tokenizer other than CLIP's; the tokenizer's source may disappear."""
    if model.config.text.tokenizer is None:
        return {}
    tokenizer: Any = model.tokenizer
    return {"tokenizer": tokenizer.to_dict()}


def checkpoint_tokenizer(checkpoint: Mapping[str, Any], config: CLIPConfig) -> TextTokenizer | None:
    """Return the tokenizer in a checkpoint; None for CLIP's own."""
    text, entry = config.text, convert(checkpoint.get("tokenizer"), _TOKENIZER | None, "tokenizer")
    if entry is None or text.tokenizer is None:
        return None
    from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer, check_ids

    definition, pad_id = entry["definition"], entry["pad_id"]
    whole = isinstance(text, TextTransformerConfig) and text.padding_read > 0
    stripped_id = entry.get("stripped_id") if text.tokenizer.strip_sep_token else None
    if stripped_id is None and text.tokenizer.strip_sep_token:
        raise InputError("its tokenizer has no separator to strip")
    settings = (definition, pad_id, text.tokenizer.clean, text.context_length, whole, stripped_id)
    try:
        result, ids = HuggingFaceTokenizer(*settings), Tokenizer.from_str(definition)
    except Exception as error:  # a definition from a file: `tokenizers` raises bare Exceptions
        raise InputError(f"its tokenizer cannot be created ({reason(error)})") from error
    vocab_size = getattr(text, "vocab_size", None) or (getattr(text, "model", None) or {}).get("vocab_size")
    check_ids(ids, pad_id, vocab_size if isinstance(vocab_size, int) else sys.maxsize, "its tokenizer")
    return result


def check_base(checkpoint: Mapping[str, Any], ours: str, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless a checkpoint's LoRA belongs to the weights with this SHA-256."""
    base: Any = checkpoint.get("base")
    if base is None:
        raise InputError(f"{name}: holds no LoRA; pass it as model.pretrained")
    if base["sha256"] != ours:
        raise InputError(
            f"{name}: its LoRA belongs to {base['pretrained']} with other weights "
            f"(SHA-256 {base['sha256'][:12]}... there, {ours[:12]}... here)"
        )
