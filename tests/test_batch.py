"""A batch moves to its device without a look at its texts."""

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data._utils.pin_memory import pin_memory

from lit_clip.batch import CaptionBatch


def batch() -> CaptionBatch:
    images, tokens = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 5, dtype=torch.long)
    return CaptionBatch(images, tokens, ["a", "b"], ["x", "y"], lengths=[3, 4], negative_tokens=tokens[:1])


class Moves(TorchFunctionMode):
    """Record what is moved or pinned and how, and leave it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.pin_memory):
            self.seen.append((func.__name__, *args[1:], kwargs or {}))
            return args[0]
        return func(*args, **(kwargs or {}))


def test_lightning_moves_the_tensors_and_nothing_else() -> None:
    whole = batch()
    moved = move_data_to_device(whole, torch.device("meta"))
    assert isinstance(moved, CaptionBatch)
    for name, before, after in zip(whole._fields, whole, moved, strict=True):
        if isinstance(before, Tensor):
            assert isinstance(after, Tensor)
            assert after.device.type == "meta"
        else:
            assert after is before, name


def test_copies_to_cuda_are_not_waited_for_and_those_to_other_devices_are() -> None:
    for device in ("cuda", "mps", "cpu"):
        with Moves() as moves:
            batch().to(device)
        assert moves.seen == [("to", device, {"non_blocking": device == "cuda"})] * 3


def test_a_data_loader_pins_the_tensors_and_nothing_else() -> None:
    whole = batch()
    with Moves() as moves:
        pinned = pin_memory(whole)
    assert moves.seen == [("pin_memory", {})] * 3
    assert all(after is before for before, after in zip(whole, pinned, strict=True))


def test_what_a_source_adds_goes_where_the_images_go() -> None:
    whole = batch()._replace(negative_tokens=None, extra={"weight": torch.tensor([3.0, 5.0])})
    assert whole.to("meta").extra["weight"].device.type == "meta"
    parts = whole.stretched(4).split(2)
    assert [part.extra["weight"].tolist() for part in parts] == [[3.0, 5.0], [5.0, 5.0]]
