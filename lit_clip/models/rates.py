"""Learning rates and weight decay of parts of a model, as factors of the optimiser's settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta
from torch import nn

from lit_clip.errors import require
from lit_clip.models.layers import HEAD, SCALARS, TOWERS, Tower, layer_groups, tower_parameters
from lit_clip.tools.untrusted import Finite, NotNegative, check_fields, from_plain

Part = Literal["image", "text", "head", "temperature"]
Share = Annotated[float, Meta(gt=0, le=1)]
PARTS: tuple[Part, ...] = ("image", "text", "head", "temperature")


@dataclass
class Rate:
    """Factors of one part.

    Attributes:
        lr: of the learning rate, above 0.
        weight_decay: of the weight decay, at least 0; parameters that the rule ``decay`` exempts have none.
    """

    lr: Finite = 1.0
    weight_decay: NotNegative = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "model.rates")


@dataclass
class LayerDecay:
    """Each layer's learning rate as a fraction of the next layer's; the head has the full rate.

    Attributes:
        image: for the image encoder, above 0 and at most 1.
        text: for the text encoder, above 0 and at most 1.
    """

    image: Share = 1.0
    text: Share = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "model.rates.layer_decay")


@dataclass
class Rates:
    """Factors of each part; a plain number is a factor of the learning rate.

    Attributes:
        image: the image encoder.
        text: the text encoder.
        head: the heads of both encoders, which are all behind their blocks, and the loss's own parameters. None: a head
            has the factors of its encoder, and the loss has none.
        temperature: ``logit_scale`` and ``logit_bias``.
        layer_decay: each layer's learning rate, beside the factor of its encoder, as a fraction of the next layer's:
            one value, or one for each encoder.
    """

    image: Finite | Rate = 1.0
    text: Finite | Rate = 1.0
    head: Finite | Rate | None = None
    temperature: Finite | Rate = 1.0
    layer_decay: Share | LayerDecay = 1.0

    def __post_init__(self) -> None:
        for name in (*PARTS, "layer_decay"):
            value = getattr(self, name)
            if isinstance(value, Mapping):  # from a checkpoint
                kind = LayerDecay if name == "layer_decay" else Rate
                setattr(self, name, from_plain(kind, value, f"model.rates.{name}"))
        check_fields(self, "model.rates")
        for part in PARTS:
            lr = self.of(part).lr
            require(lr > 0, f"model.rates.{part}: {lr:g} must be above 0; model.freeze keeps a part as it is")
        self.layer_decay_of("image")

    def of(self, part: Part) -> Rate:
        """Return the factors of a part; if ``head`` is None, they are 1 for the loss."""
        value = getattr(self, part)
        return value if isinstance(value, Rate) else Rate(1.0 if value is None else value)

    def layer_decay_of(self, tower: Tower) -> float:
        """Return an encoder's layer decay."""
        value = self.layer_decay
        return getattr(value if isinstance(value, LayerDecay) else LayerDecay(value, value), tower)


class Layer(NamedTuple):
    """Parameters with the same factors, and the part that sets them."""

    name: str
    part: Part
    rate: Rate
    parameters: list[nn.Parameter]


def rated_layers(model: Any, rates: Rates | None) -> list[Layer]:
    """Return a model's layers from the heads to the embeddings; each parameter is in exactly one.

    Without rates, there is one layer, ``all``, if everything is trained, and otherwise one for each encoder.
    """
    everything: dict[str, nn.Parameter] = dict(model.named_parameters())
    if rates is None and all(parameter.requires_grad for parameter in everything.values()):
        return [Layer("all", "head", Rate(), list(everything.values()))]
    rates = rates or Rates()
    layers = [layer for tower in TOWERS for layer in _tower_layers(model, tower, rates)]
    scalars = [everything[name] for name in SCALARS if name in everything]
    layers.append(Layer("temperature", "temperature", rates.of("temperature"), scalars))
    for part in PARTS:
        trained = any(p.requires_grad for layer in layers if layer.part == part for p in layer.parameters)
        frozen = f"model.rates.{part}: this part is frozen, so a factor changes nothing; leave it out"
        require(trained or rates.of(part) == Rate(), frozen)
    return layers


def _tower_layers(model: Any, tower: Tower, rates: Rates) -> list[Layer]:
    own, decay = rates.of(tower), rates.layer_decay_of(tower)
    if decay == 1 and rates.head is None:  # layers may be unknown, and need not be known
        return [Layer(tower, tower, own, list(tower_parameters(model, tower).values()))]
    part, head = (tower, own) if rates.head is None else ("head", rates.of("head"))
    groups = {group.name: list(group.parameters.values()) for group in reversed(layer_groups(model, tower))}
    layers = [Layer(f"{tower}.{HEAD}", part, head, groups.pop(HEAD))] if HEAD in groups else []
    if decay == 1:
        return [*layers, Layer(tower, tower, own, [p for members in groups.values() for p in members])]
    for depth, (name, members) in enumerate(groups.items(), start=1):
        layers.append(Layer(f"{tower}.{name}", tower, Rate(own.lr * decay**depth, own.weight_decay), members))
    return layers
