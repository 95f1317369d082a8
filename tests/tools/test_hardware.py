"""The device that commands use."""

import pytest
import torch

from lit_clip.tools.hardware import best_device
from tests.conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_build_of_torch_without_a_gpu_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))  # of such a build
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert best_device() == torch.device("cpu")


def test_no_other_module_chooses_a_device_by_the_build() -> None:
    """Elsewhere ``torch.cuda.is_available`` decides, which is false without a GPU, or Lightning's ``auto``."""
    sources = [path for package in ("lit_clip", "callbacks", "datamodules") for path in (ROOT / package).rglob("*.py")]
    by_the_build = ("current_accelerator", "cuda.is_built", "version.cuda", '"cuda" if')
    found = [path for path in sources if any(word in path.read_text(encoding="utf-8") for word in by_the_build)]
    assert [str(path.relative_to(ROOT)) for path in found] == ["lit_clip/tools/hardware.py"]
