"""Skip samples that cannot be used, and check captions; lit_clip/tools/images.py refuses unreadable images."""

from typing import Any, NamedTuple, TypeVar

from torch.utils.data import Dataset

from lit_clip.errors import BadSample

BLANK = frozenset({"", "nan", "none", "null", "n/a", "<na>"})  # what spreadsheets and pandas write for "no caption"

Item = TypeVar("Item")


class Skipped(NamedTuple):
    """Placeholder that a dataset returns for a sample that cannot be used."""

    where: str
    reason: str


class SkippingDataset(Dataset[Any]):
    """Dataset that returns :class:`Skipped` for a bad sample; never a neighbour in its place."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Any) -> Any:
        try:
            return self.dataset[sample]
        except BadSample as error:
            return Skipped(error.where, error.reason)


def split_skipped(items: list[Item | Skipped]) -> tuple[list[Item], list[tuple[str, str]]]:
    """Separate the usable items from the (where, reason) of each skipped one."""
    skipped = [(item.where, item.reason) for item in items if isinstance(item, Skipped)]
    return [item for item in items if not isinstance(item, Skipped)], skipped


def check_caption(caption: object, where: str) -> str:
    """Return the caption unchanged.

    Raises:
        BadSample: it is missing, blank, a spreadsheet's "nan" or "null", or not text.
    """
    if caption is None or caption != caption or str(caption).strip().lower() in BLANK:  # NaN differs from itself
        raise BadSample(where, "no caption", "no caption; write one or remove it")
    if not isinstance(caption, str):
        raise BadSample(where, "caption is not text", f"the caption is not text: {str(caption)[:60]!r}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise BadSample(where, "caption is not text", "the caption is not UTF-8 text; fix or remove it") from None
    return caption
