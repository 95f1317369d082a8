"""Load published or trained weights: open them, choose the architecture, resize, fill a model."""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Size
from lit_clip.models.finetuning import Freeze, frozen_names
from lit_clip.models.lora import LoRA, add_lora, merge_lora
from lit_clip.models.registry import reads_padding, resized, resolve_architecture
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.sharded_files import lazy_zeros
from lit_clip.tools.untrusted import from_plain
from lit_clip.tools.weight_files import Source, checked_tensors, is_path, read_file
from lit_clip.weights.checkpoints import check_base, checked

if TYPE_CHECKING:
    from lit_clip.weights.sources import Weights

DEFAULT_ARCHITECTURE = "ViT-B-32"


def create_model(
    name: str | CLIPConfig | None,
    pretrained: Source | None = None,
    image_size: Size | None = None,
    context_length: int | None = None,
) -> CLIP:
    """Create a model by name (:func:`list_models`) or configuration, with random or pretrained weights.

    Args:
        name: the architecture; ``pretrained`` must agree with it. None: the one of ``pretrained``, or ViT-B-32 without
            it. A name leaves the preprocessing to the weights.
        pretrained: anything :func:`load_model` opens, or an open_clip tag for that name.
        image_size: overrides the architecture's, as ``context_length`` does, see :func:`load_model`.
        context_length: most tokens of a text.
    """
    if pretrained is not None:
        return _load(whole_name(name, pretrained), name, image_size, context_length)
    config = resized(resolve_architecture(DEFAULT_ARCHITECTURE if name is None else name), image_size, context_length)
    return _CREATE.get()(config)


def load_model(
    source: Source,
    architecture: str | CLIPConfig | None = None,
    image_size: Size | None = None,
    context_length: int | None = None,
) -> CLIP:
    """Load a trained or published model, ready to embed: on the CPU, float32, in evaluation mode.

    Args:
        source: a checkpoint of ``lit-clip fit``; OpenAI's ``.pt``; open_clip's ``.bin``, ``.pt`` (with the
            ``params.txt`` of its run beside it or above), ``.safetensors`` or a folder with ``open_clip_config.json``;
            a folder of transformers' ``CLIPModel``, ``SiglipModel``, ... (docs/models.md); a name ``org/name``
            on the Hugging Face hub, or ``org/name/file.pt`` there; ``model:tag`` of open_clip's registry; or
            ``model:file``.
        architecture: required if the file does not name its own; otherwise the two must agree. A name leaves the
            preprocessing to the weights.
        image_size: overrides the weights'; the position embedding is interpolated (bicubic, antialiased).
        context_length: overrides the weights'; positions are truncated at the end, or those beyond the 20th are
            stretched as in Long-CLIP, see :func:`lit_clip.models.resize.stretched`. The features of captions of up to
            20 tokens stay the same, except those of a text encoder that reads padding (SigLIP), which a longer context
            changes until it is trained.
    """
    return _load(source, architecture, image_size, context_length).eval()


def _load(
    source: Source,
    architecture: str | CLIPConfig | None,
    image_size: Size | None,
    context_length: int | None,
    above: tuple[Path, ...] = (),  # checkpoints of LoRAs whose base this is
) -> CLIP:
    from lit_clip.weights.open_clip import architecture_by_shapes
    from lit_clip.weights.sources import check_same, open_weights

    expected = None if architecture is None else resolve_architecture(architecture)
    weights = open_weights(source, named=expected is not None)
    if weights.lora is not None:
        weights = _merged(weights, *weights.lora, above)

    state, tokenizer = weights.state, weights.tokenizer
    if not weights.has_our_names:
        state = _without_decoder(state, weights.name)
    # Where the weights name an architecture and one is expected they agree; the first also locates a tokenizer.
    stored = weights.config or expected or architecture_by_shapes(state, partial(_fits, state), weights.name)
    if stored is None:
        if not any(re.search("text|token|transformer", name) for name in state):
            raise InputError(
                f"{weights.name}: the weights have no text encoder, so they are no CLIP's (docs/encoders.md)"
            )
        raise InputError(
            f"{weights.name}: the weights do not name their model; put its name in front, as in "
            f"{DEFAULT_ARCHITECTURE}:{weights.name} (lit-clip models lists the names), or put the "
            "params.txt of its open_clip run beside it"
        )
    wanted = resized(stored, image_size, context_length)
    if weights.config and expected:
        theirs = weights.config.preprocessing  # often differs from an architecture's default
        if isinstance(architecture, str) and theirs and theirs.image_size == expected.image.image_size:
            expected = dataclasses.replace(expected, preprocessing=theirs)
        # Both resized: a size passed beside an architecture may be part of it already.
        check_same(wanted, resized(expected, image_size, context_length), weights.name)

    if not weights.has_our_names:
        state = _our_names(state, stored)
    if wanted != stored:
        from lit_clip.models.resize import resize_weights

        check_weights(_empty(stored), state, weights.name)
        state = resize_weights(state, stored, wanted)
        tokenizer = tokenizer and tokenizer.with_context(wanted.text.context_length)
    model = _filled(wanted, state, tokenizer, weights.name)
    length = stored.text.context_length
    if wanted.text.context_length != length and reads_padding(stored.text):
        model.stretched_from = length
        change = f"{wanted.text.context_length}, longer than the weights' {length}, by stretched positions"
        features = "this text encoder reads padding, so the features of all texts change until it is trained"
        warnings.warn(f"{weights.name}: context_length: {change}; {features}", stacklevel=2)
    return model


def whole_name(architecture: str | CLIPConfig | None, pretrained: Source) -> Source:
    """Return ``model:tag`` for an open_clip tag given with an architecture's name, anything else unchanged."""
    tag = os.fspath(pretrained)
    if isinstance(architecture, str) and not is_path(tag) and "/" not in tag and ":" not in tag:
        return f"{architecture}:{tag}"
    return pretrained


def _merged(weights: "Weights", path: Path, checkpoint: dict[str, Any], above: tuple[Path, ...]) -> "Weights":
    """Merge a LoRA into the base weights that its checkpoint names."""
    hparams = checkpoint["hyper_parameters"]
    base = hparams.get("pretrained")
    if not base or hparams.get("lora") is None:
        raise InputError(f"{path}: its settings have no LoRA, or no base of it")
    if path.resolve() in above:
        raise InputError(f"{path}: its LoRA belongs to a model that is made of it")
    try:
        architecture = resolve_architecture(hparams["architecture"])
        sizes = hparams.get("image_size"), hparams.get("context_length")
        model = _load(base, architecture, *sizes, (*above, path.resolve()))
        for name in frozen_names(model, from_plain(Freeze, hparams.get("freeze") or {}, "freeze")):
            model.get_parameter(name).requires_grad_(False)  # a frozen block has no additions
        sha256 = add_lora(model, from_plain(LoRA, hparams["lora"], "lora"))
    except InputError as error:
        raise InputError(f"{path}: cannot open the weights that its LoRA belongs to: {error}") from error
    check_base(checkpoint, sha256, path)
    state = {**model.state_dict(), **weights.state}
    check_weights(model, state, path)
    model.load_state_dict(state)
    merge_lora(model)
    return dataclasses.replace(weights, state=model.state_dict(), lora=None)


_TEXT_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
_DECODER = "text_decoder."  # CoCa's
_NO_WEIGHTS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
_NO_WEIGHTS |= {"text.transformer.embeddings.position_ids"}


def _our_names(state: dict[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Undo renames of older open_clip versions, and drop entries of OpenAI's archives that are not weights."""
    if config.papers_layout and "text.token_embedding.weight" in state:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    elif not config.papers_layout and "token_embedding.weight" in state:  # open_clip's without ``custom_text``
        state = {f"text.{key}" if key.partition(".")[0] in _TEXT_PARTS else key: value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _NO_WEIGHTS}
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(())
    return state


def _without_decoder(state: dict[str, Tensor], name: Source) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if not key.startswith(_DECODER)}
    if len(kept) < len(state):
        left = sum(value.numel() for key, value in state.items() if key.startswith(_DECODER))
        warnings.warn(
            f"{name}: CoCa's caption decoder ({left / 1e6:.1f} million weights) is left out: no captions are written",
            stacklevel=2,
        )
    return kept


class _Uninitialised(TorchFunctionMode):
    """Skip random initialisation on the meta device: it would import torch's compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        if func is torch.randn and "generator" not in kwargs and str(kwargs.get("device")) == "meta":
            func = torch.empty
        return func(*args, **kwargs)


def _empty(config: CLIPConfig, tokenizer: TextTokenizer | None = None) -> CLIP:
    """Create a model on the meta device: no memory for its weights."""
    with _Uninitialised(), torch.device("meta"):  # in this order: the mode sees the device
        return CLIP(config.without_pretrained(), tokenizer)


# How create_model makes a model without pretrained weights; weights_come_later changes it.
_CREATE: ContextVar[Callable[[CLIPConfig], CLIP]] = ContextVar("_CREATE", default=CLIP)


@contextmanager
def weights_come_later(state: Mapping[str, Tensor] | None = None, name: str = "") -> Iterator[None]:
    """Skip random initialisation: new weights are zeros without memory, until they are given or loaded.

    With the ``state`` that will be loaded, of the source ``name``, a model must be of its size.
    """
    token = _CREATE.set(partial(_unwritten, state=state, name=name))
    try:
        yield
    finally:
        _CREATE.reset(token)


def _unwritten(config: CLIPConfig, state: Mapping[str, Tensor] | None, name: str) -> CLIP:
    model = _empty(config)
    if state is not None:
        check_weights(model, state, name)
        if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in state):
            return CLIP(config.without_pretrained())  # another library's, which only a real model computes
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_meta:
            zeros = lazy_zeros(tensor.shape, tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(zeros, tensor.requires_grad) if parameter else zeros)
    return model


def _fits(state: dict[str, Tensor], config: CLIPConfig) -> bool:
    try:
        check_weights(_empty(resolve_architecture(config)), _our_names(state, config), "")
    except InputError:
        return False
    return True


def _filled(config: CLIPConfig, state: dict[str, Tensor], tokenizer: TextTokenizer | None, name: Source) -> CLIP:
    """Create a model that adopts the tensors themselves, so that no weight is in memory twice."""
    model = _empty(config, tokenizer)
    check_weights(model, state, name)
    check_finite_weights(state, name)
    model.load_state_dict(state, assign=True)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        # Encoders of other libraries have buffers outside the state dict, which only a real model computes.
        model = CLIP(config.without_pretrained(), tokenizer)
        model.load_state_dict(state)
    return model


def check_weights(model: CLIP, state: Mapping[str, Any], name: Source) -> None:
    """Raise :class:`InputError` naming a weight that is missing, unknown, quantised or of another shape."""
    ours = model.state_dict()
    shapes, theirs = ({key: tuple(value.shape) for key, value in each.items()} for each in (ours, state))
    wrong = sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key))
    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (theirs, shapes))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{name}: weights do not fit: {wrong[0]}{more} is {there} there and {here} here")
    for key, value in ours.items():
        if value.is_floating_point() != state[key].is_floating_point():
            raise InputError(f"{name}: weights do not fit: {key} is {state[key].dtype} there and {value.dtype} here")


def check_finite_weights(state: Mapping[str, Tensor], name: Source) -> None:
    """Raise :class:`InputError` naming the first weight with NaN or infinity; reads all, 0.1 s a GB."""
    for key, value in state.items():
        if value.is_floating_point() and value.numel():
            ends = torch.stack(torch.aminmax(value.detach()))  # NaN is both; takes no copy of the weight
            if not ends.isfinite().all():
                problem = "holds NaN or infinity; its training diverged, or the file is damaged: use another"
                raise InputError(f"{name}: {key} {problem}")


def open_checkpoint(source: Any) -> tuple[dict[str, Any], str]:
    """Open and check a training checkpoint, given as path, address or open file; return it and its name."""
    if isinstance(source, str | os.PathLike) and "://" not in str(source):
        checkpoint, name = read_file(Path(source)), str(source)
    else:
        from lit_clip.tools.hub_client import store_of

        is_open = hasattr(source, "read")
        name = str(getattr(source, "name", "checkpoint") if is_open else source)
        with naming(name), reading(name, "checkpoint"), ExitStack() as stack:
            store, path = (None, "") if is_open else store_of(name)
            file = source if store is None else stack.enter_context(store.open(path, "rb"))
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    checked(checkpoint, name)
    checked_tensors(checkpoint["state_dict"], name)
    return checkpoint, name


def check_fits(checkpoint: dict[str, Any], name: Source) -> None:
    """Raise :class:`InputError` unless a checkpoint's weights fit its architecture.

    A LoRA's base is compared when it is opened, and an encoder of your own is code.
    """
    state = checked_tensors(checkpoint["state_dict"], name)
    config = CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"])
    if not config.own_encoders and "base" not in checkpoint:
        check_weights(_empty(resolve_architecture(config)), state, name)
