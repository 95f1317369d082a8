"""Sizes of images, and the range of each number of an architecture."""

Size = int | tuple[int, int]
"""In pixels: the side of a square, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    """Return a :data:`Size` as height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def normalised(size: Size) -> Size:
    """Return a square as one number; JSON and YAML give a list instead of a tuple."""
    height, width = height_width(size)
    return height if height == width else (height, width)


# Least and most of the numbers in an architecture. The largest are far above any model's; beyond them a file's model
# would fill the memory before its weights could be compared with the file's own.
RANGES: dict[str, tuple[float, float]] = {
    **{"image_size": (1, 16384), "width": (1, 65536), "layers": (1, 1000), "heads": (1, 65536)},
    "pool_queries": (1, 65536),
    "pool_heads": (1, 65536),
    "eos_id": (0, 2**24),
    "embed_dim": (1, 65536),
    "patch_size": (1, 16384),
    "mlp_ratio": (1e-3, 1000),
    "context_length": (3, 65536),  # start, a word, end
    "vocab_size": (1, 2**24),
    "layer_norm_eps": (0, 1),
}
