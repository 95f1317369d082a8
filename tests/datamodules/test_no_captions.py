"""Data module without pairs."""

import pytest

from datamodules import NoCaptions


def test_loader_is_empty_and_has_no_length() -> None:
    loader = NoCaptions().val_dataloader()
    assert list(loader) == []
    with pytest.raises(TypeError):  # a length of 0 would make Lightning skip the epoch with its hooks
        len(loader)
