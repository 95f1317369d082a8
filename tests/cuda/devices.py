"""Devices of tests that run on a GPU, and without one on the CPU and on a pretended device, so that they cannot rot."""

import pytest
import torch

from tests.helpers import pretended

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
OTHERS = [pretended.NAME, pytest.param("cuda", marks=CUDA)]
DEVICES = ["cpu", *OTHERS]
REAL = ["cpu", pytest.param("cuda", marks=CUDA)]  # of torch.compile and process groups
