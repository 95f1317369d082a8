"""Devices of tests that run on a GPU, and on the CPU too, so that they cannot rot where there is no GPU."""

import pytest
import torch

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
