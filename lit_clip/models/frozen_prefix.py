"""The frozen first layers of a tower: compute their output once, then only the layers after them.

The output is taken where the first module with trainable parameters is called, and given to it again. Our own encoders
and Hugging Face's start at that module; an image encoder of timm runs its frozen layers on an empty batch, which costs
nothing, and gets the stored activations there.

Shapes: B batch, L tokens, W width, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.models.layers import Tower, tower_blocks, tower_encoder, tower_parameters
from lit_clip.models.running import PartialForward, evaluation_mode, starting_at
from lit_clip.models.transformer import TextTransformer, VisionTransformer


class FrozenPrefix(NamedTuple):
    """The frozen first layers of a tower, without references to modules, so that models can be copied."""

    tower: Tower
    boundary: str | None = None  # name within the model of the first module to compute; None: all is frozen
    block: int = 0  # number of frozen blocks before the boundary
    is_block: bool = False  # whether the boundary is a block
    values: int = 0  # how many values the frozen blocks return; 0 for a tensor
    blanks: int = 0  # images that timm's frozen layers compute in every step for nothing: 1 if not an empty batch


class _ReachedError(Exception):
    def __init__(self, name: str, activations: Any) -> None:
        super().__init__(name)
        self.name, self.activations = name, activations


def _first_call(model: nn.Module, names: Sequence[str], run: Callable[[], Tensor]) -> _ReachedError | None:
    """Run a model up to the first call of one of the named modules."""

    def stop(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ReachedError(name, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(stop, name), with_kwargs=True))
        try:
            run()
        except _ReachedError as reached:
            return reached
    return None


def find_frozen_prefix(model: Any, tower: Tower) -> FrozenPrefix | None:
    """Find a :class:`lit_clip.CLIP` tower's frozen first layers by running it on one sample; None: no block."""
    if not any(parameter.requires_grad for parameter in tower_parameters(model, tower).values()):
        return FrozenPrefix(tower)
    blocks = tower_blocks(model, tower)
    if not any(all(not p.requires_grad for p in block.parameters()) for block in blocks):
        return None
    values: list[int] = []  # of each block that was called

    def note(_: nn.Module, __: Any, output: Any) -> None:
        values.append(len(output) if isinstance(output, tuple) else 0)

    with ExitStack() as hooks, torch.enable_grad():
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(note))
        sample = sample_inputs(model, tower, 1)
        reached = _first_call(model, _candidates(model, tower, blocks), lambda: _run(model, tower, *sample))
    if reached is None or not isinstance(reached.activations, Tensor) or reached.activations.requires_grad:
        raise _refusal(tower, "end at no single module")
    if not values:
        return None
    is_block = any(model.get_submodule(reached.name) is block for block in blocks)
    return FrozenPrefix(tower, reached.name, len(values), is_block, values[0])


def _refusal(tower: Tower, reason: str) -> InputError:
    return InputError(
        f"FrozenFeatures: the frozen layers of the {tower} encoder {reason}; set model.freeze.{tower} to all, or "
        "remove the callback"
    )


def use_frozen_prefix(model: Any, tower: Tower) -> FrozenPrefix | None:
    """Set ``model.frozen_prefixes`` for a tower; None if the tower has no frozen block.

    Checks that the layers behind the frozen ones give the same features without them.
    """
    prefix = find_frozen_prefix(model, tower)
    if prefix is None:
        return None
    inputs, lengths = sample_inputs(model, tower, 2)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            with evaluation_mode(model):
                stored = frozen_activations(model, prefix, inputs, lengths)
            if not torch.equal(stored, frozen_activations(model, prefix, inputs, lengths)):
                raise _refusal(tower, "are random in training (dropout)")
            with evaluation_mode(model):
                expected = _run(model, tower, inputs, lengths)
                for blanks in (0, 1):
                    prefix = model.frozen_prefixes[tower] = prefix._replace(blanks=blanks)
                    if _gives(model, tower, stored, expected, inputs, lengths):
                        return prefix
        raise _refusal(tower, "hand on more than one tensor")
    except InputError:
        model.frozen_prefixes.pop(tower, None)
        raise


def _gives(model: Any, tower: Tower, stored: Tensor, expected: Tensor, tokens: Tensor, lengths: Sequence[int]) -> bool:
    try:
        from_text = tower == "text"
        found = text_features_from(model, stored, tokens, lengths) if from_text else image_features_from(model, stored)
    except Exception:  # encoders of other libraries raise anything
        return False
    least = 1e-5 * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=least)


def _candidates(model: nn.Module, tower: Tower, blocks: Sequence[nn.Module]) -> list[str]:
    """Return possible boundary modules: they have trainable parameters, and contain no block."""
    of_blocks = {id(block) for block in blocks}
    return [
        name
        for name, module in model.named_modules()
        if name
        and f"{name}.".startswith("visual.") == (tower == "image")
        and any(parameter.requires_grad for parameter in module.parameters())
        and not any(id(inner) in of_blocks for inner in module.modules() if inner is not module)
    ]


def sample_inputs(model: Any, tower: Tower, number: int) -> tuple[Tensor, Sequence[int]]:
    """Return one or two images of noise, or texts of equal length, with the texts' lengths."""
    if tower == "image":
        shape = model.preprocessing.shape
        noise = torch.randint(0, 256, (number, *shape), generator=torch.Generator().manual_seed(0))
        if model.preprocessing.max_patches is not None:
            for i in range(number):  # patches are masked out of attention, from which nothing can be entered
                noise[i, 0, :4] = torch.tensor([0, 1, *divmod(max(1, shape[0] - 1 - i), 256)])
        return noise.to(torch.uint8).to(model.device), ()
    tokens = model.tokenizer.trim(model.tokenizer(["a photo of a dog", "a dog of a photo"][:number]))
    return tokens.to(model.device), model.tokenizer.lengths(tokens).tolist()


def _run(model: Any, tower: Tower, inputs: Tensor, lengths: Sequence[int] = ()) -> Tensor:
    if tower == "image":
        return model.encode_image(model.normalize(inputs))
    return model.encode_text(inputs, lengths=lengths)


def frozen_activations(model: Any, prefix: FrozenPrefix, inputs: Tensor, lengths: Sequence[int] = ()) -> Tensor:
    """Compute a tower's frozen layers, ``[B, ...]``: features, ``[B, L, W]`` tokens or ``[B, C, H, W]``.

    The inputs are uint8 images ``[B, 3, H, W]``, or int64 tokens ``[B, L]`` of texts of equal length.
    """
    if prefix.boundary is None:
        return _run(model, prefix.tower, inputs, lengths)
    reached = _first_call(model, [prefix.boundary], lambda: _run(model, prefix.tower, inputs, lengths))
    assert reached is not None, "find_frozen_prefix has reached it"
    x = reached.activations
    if prefix.is_block and isinstance(tower_encoder(model, prefix.tower), VisionTransformer | TextTransformer):
        return x.unflatten(0, (len(inputs), -1))  # [B * L, W]: equal lengths are not reordered
    return x


def image_features_from(model: Any, stored: Tensor) -> Tensor:
    """Compute the image encoder after its frozen layers: :func:`frozen_activations` -> ``[B, D]``.

    If no prefix is in use, they are features in the place of an image's.
    """
    prefix, visual = model.frozen_prefixes.get("image", FrozenPrefix("image")), model.visual
    if prefix.boundary is None:
        return stored
    if isinstance(visual, VisionTransformer):
        return visual.project(
            visual.features_from(stored, prefix.block) if prefix.is_block else visual.features_behind(stored)
        )
    shape = (prefix.blanks, *model.preprocessing.shape)
    nothing = model.normalize(torch.zeros(shape, dtype=torch.uint8, device=stored.device))
    with starting_at(model.get_submodule(prefix.boundary), stored):
        return visual(nothing)


def text_features_from(model: Any, stored: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute the text encoder after its frozen layers: :func:`frozen_activations` -> ``[B, D]``.

    Stored tokens ``[B, L, W]`` may have any finite values for padding; ``tokens`` are the same texts.
    """
    prefix, encoder = model.frozen_prefixes["text"], model.text_encoder
    if prefix.boundary is None:
        return stored
    ours = isinstance(encoder, TextTransformer)
    if ours and not prefix.is_block:
        return encoder.project_text(stored)
    module = model.get_submodule(prefix.boundary)
    if stored.ndim == 2:  # pooled: the boundary is the projection
        return module(stored)
    if stored.shape[1] < tokens.shape[1]:  # of a placeholder
        stored = F.pad(stored, (0, 0, 0, tokens.shape[1] - stored.shape[1]))
    skipped = [(block, prefix.values) for block in tower_blocks(model, "text")[: prefix.block]]
    entering = PartialForward(stored, prefix.block, module, skipped)
    if not ours:
        return encoder(tokens, lengths, entering)
    if encoder is model and model.config.text.tokenizer is not None:
        lengths = ()  # see CLIP.encode_text
    return encoder.read_text(tokens, lengths, entering)
