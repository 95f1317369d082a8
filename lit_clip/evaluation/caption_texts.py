"""The distinct captions of a set of captioned images, as prompts."""

from collections.abc import Sequence

import torch

from lit_clip.evaluation.data import CaptionedImages
from lit_clip.evaluation.prompts import Prompts, templates_of
from lit_clip.retrieval.metrics import PairIndices


def caption_texts(
    images: CaptionedImages, rows: Sequence[int], templates: str | Sequence[str] | None
) -> tuple[Prompts, PairIndices]:
    """Return the distinct captions of a set as prompts, and which image (by its place in ``rows``) each belongs to.

    Of several templates the first is used; None: the caption itself.
    """
    template = templates_of(templates or "{}")[0]
    numbers: dict[str, int] = {}
    counts: dict[tuple[int, int], int] = {}
    earlier: dict[tuple[int, int], int] = {}
    rows_of_text: list[int] = []
    for image, row in enumerate(rows):
        for caption in images.captions(row):
            text = numbers.setdefault(template.replace("{}", caption), len(numbers))
            if text == len(rows_of_text):
                rows_of_text.append(0)
            earlier.setdefault((text, image), rows_of_text[text])
            rows_of_text[text] += 1
            counts[text, image] = counts.get((text, image), 0) + 1
    columns = [(image, text, count, earlier[text, image]) for (text, image), count in sorted(counts.items())]
    return Prompts(list(numbers), [[text] for text in numbers]), PairIndices(*torch.tensor(columns).T.contiguous())
