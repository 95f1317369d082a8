"""The contract of a loss: what it gets, what it returns, and how a checkpoint names it.

Shapes: B pairs of this rank, N pairs of all ranks, M hard negatives of all ranks, D embedding dimension.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.distributed import Shards
from lit_clip.errors import InputError, require
from lit_clip.losses.duplicates import pair_ids
from lit_clip.losses.tiled import HardNegatives
from lit_clip.tools.parts import Description, is_plain, plain, qualified_name
from lit_clip.tools.untrusted import factory_of, is_trusted, trusted_class


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs of a training step.

    Attributes:
        image: unit features ``[B, D]`` of the images, float32 or wider.
        text: unit features ``[B, D]`` of their captions.
        scale: inverse temperature, ``exp(logit_scale)``, a scalar.
        bias: ``logit_bias``, a scalar; None if the model has none.
        shards: number of pairs of each rank.
        batch: the pairs.
        parts: the same pairs as micro-batches; a rank with few pairs repeats its last one at the end.
        pad_id: the token that ``batch.tokens`` are padded with.
        negatives: hard negative captions; None if no rank has one, or the loss does not use them.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    shards: Shards
    batch: CaptionBatch
    parts: list[CaptionBatch]
    pad_id: int
    negatives: HardNegatives | None = None

    def ids(self) -> Tensor:
        """Return int64 ``[B, 3]``, see :func:`lit_clip.losses.duplicates.pair_ids`."""
        return pair_ids(self.batch.keys, self.batch.tokens, self.pad_id, self.batch.groups)


class WholeBatch:
    """All pairs of a training step, in the same order on every rank; gradients flow back to the ranks' features.

    What a loss does not read is not sent between ranks.

    Args:
        pairs: this rank's.

    Attributes:
        scale: inverse temperature, ``exp(logit_scale)``, a scalar.
        bias: ``logit_bias``, a scalar; None if the model has none.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self.scale, self.bias = pairs.scale, pairs.bias

    @cached_property
    def image(self) -> Tensor:
        """Unit features ``[N, D]`` of the images, float32 or wider."""
        return distributed.gather(self._pairs.image, self._pairs.shards)

    @cached_property
    def text(self) -> Tensor:
        """Unit features ``[N, D]`` of the captions, in the images' order."""
        return distributed.gather(self._pairs.text, self._pairs.shards)

    @cached_property
    def negative(self) -> Tensor | None:
        """Unit features ``[M, D]`` of hard negative captions; None if there are none."""
        negatives = self._pairs.negatives
        return None if negatives is None else distributed.gather(negatives.features, negatives.shards)

    @cached_property
    def same(self) -> Tensor:
        """Bool ``[N, N]``: which pairs have the same caption, image or group; a pair is a duplicate of itself."""
        ids = distributed.gather(self._pairs.ids(), self._pairs.shards)
        return (ids[:, None] == ids[None]).any(dim=-1)

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the images."""
        return distributed.gather_objects(list(self._pairs.batch.keys))

    @cached_property
    def captions(self) -> list[str]:
        """Texts of the captions."""
        return distributed.gather_objects(list(self._pairs.batch.captions))

    @cached_property
    def groups(self) -> list[str]:
        """Groups, empty strings for none."""
        return distributed.gather_objects(list(self._pairs.batch.groups or [""] * len(self._pairs.image)))


class LossValue(NamedTuple):
    """A loss, and what it wants logged.

    Attributes:
        loss: a scalar whose mean over ranks is the loss of the whole batch.
        metrics: logged as ``train/<name>``: scalar tensors, of which the mean over ranks is logged, or numbers that are
            the same on all ranks.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = {}


class Loss(nn.Module):
    """A training loss; override :meth:`whole_batch`, or :meth:`forward` for a faster form.

    A loss may have parameters of its own: they are trained at the learning rate of the model's head and kept in
    checkpoints. Trained with any number of processes and micro-batches, a loss that overrides :meth:`whole_batch` has
    the value and the gradients of one process with the whole batch.
    """

    uses_negatives = False
    """Whether the loss reads hard negative captions; otherwise a data module must not have them."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the constructor's arguments for :meth:`describe`."""
        loss = super().__new__(cls)
        nn.Module.__init__(loss)  # so that a class that forgets to call it works all the same
        try:
            bound = inspect.signature(cls.__init__).bind(loss, *args, **kwargs)
        except TypeError:  # wrong arguments, which __init__ reports, or a copy, which brings its own attributes
            return loss
        arguments = dict(list(bound.arguments.items())[1:])
        object.__setattr__(loss, "_arguments", arguments)  # nn.Module's own is not ready yet
        return loss

    def whole_batch(self, pairs: WholeBatch) -> Tensor | LossValue:
        """Return the loss of the whole batch, a scalar; every rank computes all of it, without autocast.

        Args:
            pairs: all pairs of the step.
        """
        raise InputError(f"model.loss: {qualified_name(type(self))} must override whole_batch, or forward")

    def forward(self, pairs: Pairs) -> Tensor | LossValue:
        """Return a scalar whose mean over ranks is the loss of the whole batch, and so is its gradient.

        Args:
            pairs: this rank's, maybe none.
        """
        with torch.autocast(pairs.image.device.type, enabled=False):
            return self.whole_batch(WholeBatch(pairs))

    def prepare(self, model: Any) -> None:
        """Check that the loss fits a :class:`lit_clip.CLIP`, and load what it needs; called when training starts."""

    def uninformed(self, pairs: int) -> float | None:
        """Return the lowest loss of a model that cannot tell which caption belongs to which image; None: unknown.

        Args:
            pairs: number of pairs in the batch of all ranks.
        """
        return None

    def describe(self) -> Description:
        """Return the class and its arguments, as plain values; an argument of another kind is shown as text."""
        return {
            "class_path": qualified_name(type(self)),
            "init_args": {name: _described(value) for name, value in self._arguments.items()},
        }


def _described(value: Any) -> Any:
    if isinstance(value, Loss):
        return value.describe()
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return plain(value) if is_plain(value) else repr(value)


def build_loss(description: Mapping[str, Any]) -> Loss:
    """Return the loss that :meth:`Loss.describe` described; only losses of lit-clip, because checkpoints hold these.

    Raises:
        InputError: the description names another class.
    """
    arguments = description.get("init_args")
    inner = arguments if trusted_class(description, Loss) and isinstance(arguments, Mapping) else {}
    built = {name: _built(value) for name, value in inner.items()}  # first, so that a refused inner loss is named
    return factory_of(description, "model.loss", Loss)(**built)


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(item) for item in value]
    return build_loss(value) if isinstance(value, Mapping) and "class_path" in value else value


def evaluate_loss(loss: Loss, pairs: Pairs) -> LossValue:
    """Call a loss and check what it returns.

    Raises:
        InputError: it returned no scalar.
    """
    result = loss(pairs)
    value = result if isinstance(result, LossValue) else LossValue(result)
    name, advice = f"model.loss: {qualified_name(type(loss))}", "return a scalar, such as its mean"
    if not isinstance(value.loss, Tensor):
        raise InputError(f"{name} returned a {type(value.loss).__name__}, not a tensor; {advice}")
    require(value.loss.ndim == 0, f"{name} returned a tensor of shape {list(value.loss.shape)}; {advice}")
    for metric, number in value.metrics.items():
        require(
            isinstance(number, int | float) or (isinstance(number, Tensor) and number.ndim == 0),
            f"{name}: its metric {metric} is not a number; {advice}",
        )
    return value


def check_gradient(loss: Loss, value: Tensor) -> None:
    """Raise :class:`InputError` if a loss's value has no gradient."""
    require(
        value.requires_grad,
        f"model.loss: {qualified_name(type(loss))} returned a loss without gradient; compute it from pairs.image and "
        "pairs.text, without detach, item or no_grad",
    )


def foreign_losses(description: Any) -> list[str]:
    """Return the class paths of a described loss, and of losses within it, that a checkpoint may not import."""
    if is_trusted(description, Loss):
        return []
    if not isinstance(description, Mapping):
        return [str(description)]
    arguments = description.get("init_args")
    values = arguments.values() if isinstance(arguments, Mapping) else ()
    inner = [item for value in values for item in _items(value) if isinstance(item, Mapping) and "class_path" in item]
    own = str(description.get("class_path"))
    found = [] if trusted_class(description, Loss) else [own]
    return [*found, *(path for item in inner for path in foreign_losses(item))] or [own]  # its arguments name something


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_resumed_loss(ours: Mapping[str, Any] | None, saved: Mapping[str, Any] | None, name: str) -> None:
    """Check that a run whose loss a checkpoint may not name names it itself when it is resumed.

    Args:
        ours: description of this run's loss; None for the default.
        saved: the checkpoint's.
        name: of the checkpoint, for messages.

    Raises:
        InputError: this run would go on with the default loss.
    """
    foreign = foreign_losses(saved) if ours is None and saved is not None else []
    require(
        not foreign,
        f"{name}: was trained with {', '.join(foreign)}, which a checkpoint may not import by itself; name the loss "
        "with --model.loss, or pass loss=... to LitCLIP",
    )
