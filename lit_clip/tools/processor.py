"""What a CPU can do."""

import torch


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them they are emulated, and slow."""
    # Newer than our oldest torch.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
