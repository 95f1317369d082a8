"""Our checkpoint files: architecture, weights under OpenAI's names, a tokenizer, the base of a LoRA."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import RANGES, CLIPConfig, Size, TextTransformerConfig, TimmConfig
from lit_clip.models.custom import custom_encoders, find_class
from lit_clip.models.custom_config import how_to_import
from lit_clip.models.finetuning import Freeze
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer, check_ids
from lit_clip.models.lora import LoRA
from lit_clip.models.rates import Rates
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.parts import is_plain, plain
from lit_clip.tools.reading import naming, reason
from lit_clip.tools.untrusted import (
    LARGEST,
    check_entries,
    check_fields,
    check_names_nothing,
    check_type,
    coerced,
    shortened,
)
from lit_clip.tools.weight_files import Source, check_tensors_within

EMA_WEIGHTS = "exponential moving average"  # a checkpoint's ``weights`` if its state_dict is an average
# The module's plain settings, with their types and ranges; see lit_clip.tools.untrusted for the rule.
_TYPES: dict[str, Any] = {
    "pretrained": str | None,
    "image_size": Size | None,
    "context_length": int | None,
    "micro_batch_size": int | None,
}
# Class and settings of a part: data, compared when a run is resumed, see lit_clip.tools.parts.Description.
_PART: dict[str, Any] = {"class_path": str, "init_args": dict[str, Any]}
_PARTS = ("optimizer", "lr_scheduler", "decay", "loss")
_DATACLASSES: dict[str, type] = {"freeze": Freeze, "rates": Rates, "lora": LoRA}
# Entries beside the settings and weights: ours, and Lightning's. A missing one is noticed by who needs it.
_OURS: dict[str, Any] = {"weights": str, **dict.fromkeys(("before", "loss", "parts"), dict[str, object])}
_LIGHTNINGS: dict[str, Any] = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "validation_due": bool,
    **dict.fromkeys(("loops", "callbacks"), dict[str, object]),
    **dict.fromkeys(("optimizer_states", "lr_schedulers", "random_states"), list[dict[str, object]]),
    **dict.fromkeys(("current_model_state", "averaging_state", "skipped_samples"), dict[str, object]),
}
# Where Lightning looks for settings too: older names of hyper_parameters, and what to make of them.
_OTHER_SETTINGS = ("hparams", "module_arguments", "hparams_name", "hparams_type")


@dataclass
class SavedTokenizer:
    """A checkpoint's entry for a tokenizer, see :meth:`HuggingFaceTokenizer.to_dict`."""

    definition: str
    pad_id: int
    stripped_id: int | None = None

    def __post_init__(self) -> None:
        ids = (0, RANGES["vocab_size"][1])
        check_fields(self, "tokenizer", {"pad_id": ids, "stripped_id": ids})


def checked(checkpoint: dict[str, Any], path: Source, ours: CLIPConfig | None = None) -> dict[str, Any]:
    """Return the checkpoint if it has weights and an architecture, and its settings obey the rule for files.

    Of a checkpoint of a model like ``ours``, which uses its own settings, those of the file are not read.
    """
    hparams, state = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
    require(
        isinstance(hparams, Mapping) and isinstance(hparams.get("architecture"), Mapping) and isinstance(state, dict),
        f"{path}: not a lit-clip checkpoint (it has no weights or names no architecture); "
        "weights of other programs open with model.pretrained",
    )
    with naming(path):
        try:
            same = ours is not None and is_of(checkpoint, ours)
            config = cast(CLIPConfig, ours) if same else _checked_settings(cast(Any, hparams))
            _check_ours(checkpoint, config)
        except RecursionError as error:
            raise InputError("not a lit-clip checkpoint (its settings are nested too deeply)") from error
    for tower, class_path in custom_encoders(config):
        if find_class(class_path) is None:
            raise InputError(f"{path}: its {tower} encoder is {class_path}; {how_to_import(class_path)}")
    return checkpoint


def is_of(checkpoint: Mapping[str, Any], ours: CLIPConfig) -> bool:
    """Return whether a checkpoint is of a model of exactly this architecture; what is no plain value is of none."""
    architecture = checkpoint["hyper_parameters"]["architecture"]
    return is_plain(architecture) and architecture == ours.to_dict()


def _checked_settings(hparams: Mapping[str, Any]) -> CLIPConfig:
    check_names_nothing(hparams, "hyper_parameters")
    config = CLIPConfig.from_dict(hparams["architecture"])
    for tower in ("image", "text"):  # a checkpoint has its own weights
        if started := getattr(getattr(config, tower), "pretrained", False):
            where = f"hyper_parameters.architecture.{tower}.pretrained"
            raise InputError(f"{where}: {shortened(started)} must be false")
    for name in _PARTS:
        require(name not in hparams, f"hyper_parameters: may not have {name}, a part; a checkpoint holds data alone")
    check_settings(hparams, "hyper_parameters.")
    for name, kind in _DATACLASSES.items():
        coerced(kind, hparams.get(name), name)
    return config


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Check the plain settings that are present."""
    for name, hint in _TYPES.items():
        value = settings.get(name)
        check_type(value, hint, f"{where}{name}:")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int):
                require(number >= 1, f"{where}{name}: {value} must be at least 1")


def _check_ours(checkpoint: Mapping[str, Any], config: CLIPConfig) -> None:
    check_entries(checkpoint, _OURS)
    if "parts" in checkpoint:
        check_entries(checkpoint["parts"], dict.fromkeys(_PARTS, dict[str, object]), "parts", complete=True)
        for name in _PARTS:
            check_entries(checkpoint["parts"][name], _PART, f"parts.{name}", complete=True)
    for name in _OTHER_SETTINGS:  # which nobody would check
        harmless = name not in checkpoint or (name == "hparams_name" and checkpoint[name] in (None, "kwargs"))
        require(harmless, f"may not have {name}; its settings are hyper_parameters")
    coerced(SavedTokenizer, checkpoint.get("tokenizer"), "tokenizer")
    if checkpoint.get("base") is not None:
        check_entries(checkpoint["base"], {"pretrained": str, "sha256": str}, "base", complete=True)
    # Otherwise opening the file would fetch what it names.
    require("tokenizer" in checkpoint or config.text.tokenizer is None, "holds no tokenizer")
    named = checkpoint["hyper_parameters"].get("pretrained")
    require(named is None or "base" in checkpoint, "hyper_parameters.pretrained: only a LoRA's checkpoint has a base")
    require(getattr(config.text, "model", {}) is not None, "holds no configuration of its text encoder")
    read = not isinstance(config.image, TimmConfig) or config.image.model is not None or not config.image.on_hub
    require(read, "holds no configuration of its image encoder")


def check_lightnings_entries(checkpoint: Mapping[str, Any], name: Source) -> None:
    """Raise :class:`InputError` if an entry that Lightning reads is of another type, before it reads them."""
    with naming(name):
        check_tensors_within(checkpoint)
        check_entries(checkpoint, _LIGHTNINGS)
        version = checkpoint.get("pytorch-lightning_version")
        numbered = isinstance(version, str) and re.match(r"\d+(\.\d+)+", version) is not None
        require(numbered, f"pytorch-lightning_version: {shortened(version)} is no version")
        migrated = not str(version).startswith("2.")  # Lightning changes what an older version wrote
        for key in ("epoch", "global_step") if migrated or "optimizer_states" in checkpoint else ():
            require(key in checkpoint, f"lacks {key}")


def saved_settings(
    model: CLIP, settings: Mapping[str, Any], sizes: Mapping[str, Any], base: Source | None
) -> dict[str, Any]:
    """Return the settings that a checkpoint keeps, as plain values; of a LoRA also its base, and how it was resized."""
    values = {name: value and plain(dataclasses.asdict(value)) for name, value in settings.items()}
    values |= dict(sizes) if base else dict.fromkeys(sizes)
    if base is not None and Path(base).exists():  # otherwise the name of published weights
        base = Path(base).resolve()
    return values | {"architecture": model.config.to_dict(), "pretrained": base and str(base)}


def saved_tokenizer(model: CLIP) -> dict[str, Any]:
    """Return a checkpoint's entry for a tokenizer other than CLIP's own, whose source may be gone later."""
    if model.config.text.tokenizer is None:
        return {}
    tokenizer: Any = model.tokenizer
    return {"tokenizer": tokenizer.to_dict()}


def checkpoint_tokenizer(checkpoint: Mapping[str, Any], config: CLIPConfig) -> TextTokenizer | None:
    """Return the tokenizer that a checkpoint holds; None if it is CLIP's own."""
    saved, text = coerced(SavedTokenizer, checkpoint.get("tokenizer"), "tokenizer"), config.text
    if saved is None or text.tokenizer is None:
        return None
    whole = isinstance(text, TextTransformerConfig) and text.padding_read > 0
    stripped_id = saved.stripped_id if text.tokenizer.strip_sep_token else None
    require(stripped_id is not None or not text.tokenizer.strip_sep_token, "its tokenizer has no separator to strip")
    try:
        result = HuggingFaceTokenizer(
            saved.definition, saved.pad_id, text.tokenizer.clean, text.context_length, whole, stripped_id
        )
        ids = Tokenizer.from_str(saved.definition)
    except Exception as error:  # a definition from a file: `tokenizers` raises bare Exceptions
        raise InputError(f"its tokenizer cannot be created ({reason(error)})") from error
    vocab_size = getattr(text, "vocab_size", None) or (getattr(text, "model", None) or {}).get("vocab_size")
    check_ids(ids, saved.pad_id, vocab_size if isinstance(vocab_size, int) else sys.maxsize, "its tokenizer")
    return result


def check_base(checkpoint: Mapping[str, Any], ours: str, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless a checkpoint's LoRA belongs to the weights with this SHA-256."""
    base: Any = checkpoint.get("base")
    require(base is not None, f"{name}: holds no LoRA; pass it as model.pretrained")
    if base["sha256"] != ours:
        raise InputError(
            f"{name}: its LoRA belongs to {base['pretrained']} with other weights "
            f"(SHA-256 {base['sha256'][:12]}... there, {ours[:12]}... here)"
        )


def check_progress(saved: Any, fresh: Any, where: str, outermost: bool = True) -> None:
    """Check that a checkpoint's counts of steps are such as a trainer that has not begun has: ``fresh``.

    ``outermost`` values are whole loops, by name.
    """
    if isinstance(fresh, Mapping):
        require(isinstance(saved, Mapping), f"{where}: {shortened(saved)} must be a mapping")
        for name, value in fresh.items():
            # Versions of Lightning have different loops; a loop of other counts is damaged.
            if name in saved or not (outermost and isinstance(value, Mapping)):
                require(name in saved, f"{where}: lacks {name}")
                check_progress(saved[name], value, f"{where}.{name}", outermost=False)
    elif type(fresh) is int:
        counts = type(saved) is int and 0 <= saved < LARGEST
        require(counts, f"{where}: {shortened(saved)} must be a whole number, at least 0")
    elif type(fresh) is bool:
        require(type(saved) is bool, f"{where}: {shortened(saved)} must be true or false")
