"""Fixtures for tests of weights."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep other libraries off the network, and silence their warnings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """Return the ONNX files of a module's tests by their encoder, filled on first use."""
    return {}


@pytest.fixture
def _traced_once(graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the same ONNX file again for an encoder with the same settings and weights: tracing it takes seconds."""
    plain = torch.onnx.export

    def trace(encoder: Any, example: tuple[torch.Tensor], path: Path, **options: Any) -> None:
        config, image = encoder.model.config, encoder.kind == "image"
        state = {n: p for n, p in encoder.model.state_dict().items() if n.startswith("visual.") == image}
        weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest()
        tower = config.image if image else config.text
        key = repr((tower, config.embed_dim, config.activation, example[0].shape, [*state], weights))
        if key not in graphs:
            plain(encoder, example, path, **options)
            graphs[key] = path.read_bytes()
        path.write_bytes(graphs[key])

    monkeypatch.setattr(torch.onnx, "export", trace)
