"""The data module without data."""

import pytest

from datamodules import NoCaptions


def test_its_loader_yields_nothing_and_does_not_say_how_much() -> None:
    loader = NoCaptions().val_dataloader()
    assert list(loader) == []
    with pytest.raises(TypeError):  # a length of 0 would make Lightning skip the epoch with its hooks
        len(loader)
