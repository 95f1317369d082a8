"""Pairs of a user's own as queries and documents: rows of one product find each other."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from lit_clip.errors import listed, require
from lit_clip.evaluation.data import Items, JudgedDocuments
from .retrieval_sets import CaptionedPairs

FIELDS = ("image", "caption")


class GroupedPairs(JudgedDocuments):
    """Images with captions search other such images; right are all of the query's group, such as a product's number.

    Where an image has several captions, the first is its text. A query without a document of its group is left out.

    Args:
        root: the folder of both.
        queries: a table of pairs that were not trained on, or another source as in :class:`CaptionedPairs`.
        documents: the pairs that are searched.
        group: the column of the groups, in both.
        query_fields: what a query has: ``image``, ``caption`` or both.
    """

    def __init__(
        self,
        root: str,
        queries: str,
        documents: str,
        group: str,
        query_fields: Sequence[Literal["image", "caption"]] = FIELDS,
    ) -> None:
        known = {*query_fields} <= {*FIELDS} and bool(query_fields)
        require(known, f"query_fields is {listed(list(query_fields))}; name image, caption or both")
        self._parts = asked, searched = [
            CaptionedPairs(str(Path(root, path)), group=group) for path in (queries, documents)
        ]
        self.annotation_paths = [*asked.annotation_paths, *searched.annotation_paths]
        of_group = defaultdict[str, list[int]](list)
        for row in range(len(searched)):
            of_group[searched.group(row)].append(row)
        of_group.pop("", None)
        rows = [row for row in range(len(asked)) if asked.group(row) in of_group]
        require(bool(rows), f"{queries}: no row's {group!r} is that of a row in {documents}; correct the column")
        self._images = [(searched, row) for row in range(len(searched))]
        self.documents = Items(
            [f"document {searched.key(row)}" for _, row in self._images],
            [searched.captions(row)[0] for _, row in self._images],
            list(range(len(searched))),
        )
        images, texts = [-1] * len(rows), [""] * len(rows)
        if "image" in query_fields:
            images = list(range(len(searched), len(searched) + len(rows)))
            self._images += [(asked, row) for row in rows]
        if "caption" in query_fields:
            texts = [asked.captions(row)[0] for row in rows]
        self.queries = Items([f"query {asked.key(row)}" for row in rows], texts, images)
        groups = [of_group[asked.group(row)] for row in rows]
        self.relevance = [(query, document, 1) for query, found in enumerate(groups) for document in found]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, index: int) -> list[Image.Image]:
        pairs, row = self._images[index]
        return pairs.images(row)

    def whole_file(self, index: int) -> Path | None:
        pairs, row = self._images[index]
        return pairs.whole_file(row)

    def key(self, index: int) -> str:
        pairs, row = self._images[index]
        return pairs.key(row)

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(path for pairs in self._parts for path in pairs.image_paths()))

    def stamp(self) -> str:
        return f"{len(self._images)}-" + "-".join(pairs.stamp() for pairs in self._parts)
