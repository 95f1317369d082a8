"""Captions that say nothing about their image."""

import re
import unicodedata

WORDS = frozenset(
    (
        *("a", "an", "the", "of", "this", "is", "my", "no", "not", "available", "none", "null", "nan", "na"),
        *("image", "images", "img", "photo", "photos", "photograph", "picture", "pictures", "pic", "pics"),
        *("untitled", "unnamed", "unknown", "caption", "alt", "description", "placeholder", "thumbnail", "thumb"),
        *("dsc", "dscn", "dscf", "pict", "pxl", "mvimg", "screenshot"),  # what cameras and phones call files
        *("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff"),
    )
)


def says_nothing(caption: str) -> bool:
    """Whether a caption is punctuation alone, or all of its words (in English) and numbers would fit any image.

    ``A photo.``, ``IMG_0123.jpg`` and ``???`` say nothing; ``7`` and ``a red photo`` do say something.
    """
    words = re.findall(r"[^\W\d_]+", caption.casefold())
    if words:
        return WORDS.issuperset(words)
    return all(unicodedata.category(character)[0] in "PZC" for character in caption)
