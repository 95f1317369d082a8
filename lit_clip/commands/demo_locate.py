"""Show where an image shows texts, in a tab of ``lit-clip demo``."""

from functools import lru_cache, partial

from PIL import Image

from lit_clip.commands.demo_trial import LONGEST_PROMPT, MOST_PROMPTS, Source, image_of, words
from lit_clip.errors import require
from lit_clip.locating.locator import Locator
from lit_clip.locating.overlay import overlays
from lit_clip.models.clip import CLIP

MOST_TEXTS = 20  # that a click finds in an image


class Tab:
    """Find texts in an image."""

    def __init__(self, model: CLIP) -> None:
        self._locator = lru_cache(maxsize=8)(partial(Locator, model))  # the next image mostly has the same texts

    def __call__(self, image: Source = None, texts: str = "", background: str = "") -> list[tuple[Image.Image, str]]:
        """Return a heat map and a cosine for each text, as ``lit-clip locate`` does.

        Texts are one a line, and so are those of the background; none of them: the command's own.
        """
        opened = image_of(image)
        wanted, others = list(dict.fromkeys(words(texts))), words(background)
        require(bool(wanted), "nothing to find: type a text a line")
        require(len(wanted) <= MOST_TEXTS, f"texts: {len(wanted)}; at most {MOST_TEXTS}")
        require(len(others) <= MOST_PROMPTS, f"background: {len(others):,} texts; at most {MOST_PROMPTS:,}")
        longest = max(map(len, [*wanted, *others]))
        require(longest <= LONGEST_PROMPT, f"a text of {longest:,} characters; at most {LONGEST_PROMPT:,}")
        located = self._locator(tuple(wanted), tuple(others) or None)(opened)
        shown = []
        for text, region, picture in zip(wanted, located.regions, overlays(opened, located), strict=True):
            found = f"{region.cosine:.3f}, {region.margin:+.3f}" if region.seen else f"not seen ({region.cosine:.3f})"
            shown.append((picture, f"{text}: {found}"))
        return shown
