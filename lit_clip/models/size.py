"""Image sizes, and the allowed range of each number in an architecture."""

from typing import Annotated

from msgspec import Meta

# The largest numbers are far above any model's; beyond them a file's model would fill the memory before its weights
# could be compared with the file's own. A grid of patches has sides of two bytes (lit_clip.models.patches).
Side = Annotated[int, Meta(ge=1, le=16384)]
Width = Annotated[int, Meta(ge=1, le=65536)]
Layers = Annotated[int, Meta(ge=1, le=1000)]
Ratio = Annotated[float, Meta(ge=1e-3, le=1000)]
ContextLength = Annotated[int, Meta(ge=3, le=65536)]  # start, a word, end
TokenID = Annotated[int, Meta(ge=0, le=2**24)]
VocabSize = Annotated[int, Meta(ge=1, le=2**24)]

# Not tuple[Side, Side]: msgspec (0.19 to 0.23) crashes on a number with a range beside a tuple of fixed length.
Size = Side | Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)]
"""In pixels: the side of a square, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    """Return a :data:`Size` as height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def normalised(size: Size) -> Size:
    """Return a square size as one number; JSON and YAML give a list instead of a tuple."""
    height, width = height_width(size)
    return height if height == width else (height, width)
