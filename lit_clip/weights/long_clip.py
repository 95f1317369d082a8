"""Long-CLIP's own files: OpenAI's models with two position tables, each used for some positions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.models.resize import KEPT_POSITIONS
from lit_clip.tools.weight_files import Source

POSITIONS = "positional_embedding_res"  # the weight that no other model has


def read(state: Mapping[str, Tensor], name: Source) -> dict[str, Tensor]:
    """Join the tables: the first, as trained by CLIP, has the first 20 positions, the second has the others."""
    first, second = state.get("positional_embedding"), state[POSITIONS]
    if first is None or first.shape != second.shape or second.ndim != 2:
        raise InputError(
            f"{name}: weights do not fit: Long-CLIP has positional_embedding beside {POSITIONS}, of one shape"
        )
    joined = torch.cat([first[:KEPT_POSITIONS], second[KEPT_POSITIONS:]])
    return {**{name: tensor for name, tensor in state.items() if name != POSITIONS}, "positional_embedding": joined}
