"""Fixtures for tests of weights."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep other libraries off the network, and silence their warnings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)
