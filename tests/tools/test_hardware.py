"""The device that commands use."""

import pytest
import torch

from lit_clip.tools.hardware import best_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_build_of_torch_without_a_gpu_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))  # of such a build
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert best_device() == torch.device("cpu")
