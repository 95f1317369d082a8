"""``torch.compile`` in place: names in the state dict stay, and a graph serves all batches."""

from typing import Any

import torch

from lit_clip.models.layers import TOWERS, tower_blocks

MOST_GRAPHS = 64


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile each block of a :class:`lit_clip.CLIP`'s towers; what was compiled stays as it is.

    By the block and not by the tower: equal blocks share their graphs, and what lies between them may look at a batch.
    A text then is padded to one of a few lengths, for each of which there is a graph.

    Args:
        model: whose blocks.
        backend: of ``torch.compile``.
    """
    model.text_encoder.few_lengths = True
    # Blocks of both towers are one function: each length, with and without gradients, is a graph of it, and beyond the
    # limit torch gives up and runs them plainly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for tower in TOWERS:
        for block in tower_blocks(model, tower):
            if block._compiled_call_impl is None:
                block.compile(backend=backend)
