"""Sizes of images."""

Size = int | tuple[int, int]
"""In pixels: the side of a square, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    """Return a :data:`Size` as height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def normalised(size: Size) -> Size:
    """Return a square as one number; JSON and YAML give a list instead of a tuple."""
    height, width = height_width(size)
    return height if height == width else (height, width)
