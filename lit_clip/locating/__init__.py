"""Where images show texts: regions of heat maps, texts that are not there, overlays to look at."""

from lit_clip.locating.locator import Located, Locator
from lit_clip.locating.regions import Region

__all__ = ["Located", "Locator", "Region"]
