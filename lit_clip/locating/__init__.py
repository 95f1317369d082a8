"""Show where images show texts: regions of heat maps, absent texts, and overlays."""

from lit_clip.locating.locator import Located, Locator
from lit_clip.locating.regions import Region

__all__ = ["Located", "Locator", "Region"]
