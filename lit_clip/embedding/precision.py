"""Precision of the encoders in commands that compute features, by Lightning's names."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from lit_clip.errors import require
from lit_clip.tools.hardware import best_device, computes_in_bfloat16

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
"""float32, or matrix products under autocast with float32 weights."""

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def check_precision(precision: Precision, accelerator: str = "auto") -> None:
    """Refuse a precision that the device lacks; warn if it is emulated. ``accelerator`` is Lightning's name."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and best_device().type == "cpu")
    require(precision != "16-mixed" or not on_cpu, "--precision 16-mixed: needs a GPU; on a CPU use 32-true")
    if precision == "bf16-mixed" and computes_in_bfloat16(accelerator) is False:
        from lightning.pytorch.utilities import rank_zero_warn  # takes seconds

        rank_zero_warn(
            "--precision bf16-mixed: emulated on this processor, which has no bfloat16 instructions, and slower than "
            "32-true"
        )


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context for encoding; ``32-true`` keeps the surrounding context, such as a trainer's."""
    return nullcontext() if precision == "32-true" else torch.autocast(device.type, _DTYPES[precision])
