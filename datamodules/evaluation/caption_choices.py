"""Images with right and wrong captions: SugarCrepe, ARO, MMVP-VLM, Winoground and WinoGAViL, in their own files."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from msgspec import Meta
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Box, CaptionChoices, Choice
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import convert, entries
from .annotation_files import AGAIN, find, read_json, read_json_lines, read_lines, read_table, read_text, whole_number
from .image_files import UnlabelledFiles

Subset = Literal["add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"]
FEWEST = 25  # questions about a pair of attributes that counts in ARO's mean
# ARO's notebook leaves these relations out of its mean, because exchanging their objects need not make them wrong.
SYMMETRIC = Path(__file__).with_name("aro_symmetric_relations.txt")
EDGE = Annotated[int, Meta(ge=-(10**9), le=10**9)] | Annotated[float, Meta(gt=-1e9, lt=1e9)]  # of a region, in pixels


class _ChoiceFiles(UnlabelledFiles, CaptionChoices):
    """Questions of a file about images below a folder; images with the same path are one image."""

    def __init__(self, root: Path, questions: Iterable[tuple[Sequence[str], Choice]], where: Path) -> None:
        row_of: dict[str, int] = {}
        self._choices: list[Choice] = []
        for names, choice in questions:
            rows = tuple(row_of.setdefault(name, len(row_of)) for name in names)
            self._choices.append(choice._replace(images=rows))
        require(bool(self._choices), f"{where}: no questions in it; {AGAIN}")
        super().__init__(root, list(row_of), [where])

    def choices(self) -> list[Choice]:
        return list(self._choices)


def _rows(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """Return the elements of a JSON list or mapping; each must have the given fields."""
    content = read_json(path, list | dict)
    named = content.items() if isinstance(content, dict) else enumerate(content)
    kind = entries(fields, total=True)
    rows = []
    for name, row in named:
        with naming(f"{path} row {name}"):
            rows.append(convert(row, kind))
    return rows


def SugarCrepe(root: str, subset: Subset) -> _ChoiceFiles:
    """SugarCrepe: a caption of COCO and a wrong caption that a language model made from it.

    ``root`` has the seven JSON files (or ``data`` with them), named by what was added, replaced or swapped, and COCO's
    ``val2017``.
    """
    top = Path(root)
    path = find(top, (f"{subset}.json", f"data/{subset}.json"), "file of captions")
    images = find(top, ("val2017", "images/val2017", "coco/val2017"), "COCO's val2017")
    rows = _rows(path, filename=str, caption=str, negative_caption=str)
    questions = [([row["filename"]], Choice((), (row["caption"], row["negative_caption"]))) for row in rows]
    return _ChoiceFiles(images, questions, path)


class AROVisualGenome(_ChoiceFiles):
    """ARO's VG-Relation and VG-Attribution: a region of an image, with the objects or attributes exchanged.

    Groups are the relations, without the symmetric ones, and the pairs of attributes with at least 25 questions: the
    authors' notebook takes the mean over these. ``root`` has ``visual_genome_relation.json`` or
    ``visual_genome_attribution.json``, and ``images``.
    """

    def __init__(self, root: str, subset: Literal["relation", "attribution"]) -> None:
        path = find(Path(root), (f"visual_genome_{subset}.json",), f"visual_genome_{subset}.json")
        grouped = {"relation_name": str} if subset == "relation" else {"attributes": tuple[str, str]}
        edges = dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), EDGE)
        rows = _rows(path, image_path=str, true_caption=str, false_caption=str, **grouped, **edges)
        groups = [row["relation_name"] if subset == "relation" else "_".join(row["attributes"]) for row in rows]
        counts, symmetric = Counter(groups), set(read_lines(SYMMETRIC))
        questions = []
        regions: dict[str, tuple[str, Box]] = {}
        for row, group in zip(rows, groups, strict=True):
            left, top = row["bbox_x"], row["bbox_y"]
            region = (left, top, left + row["bbox_w"], top + row["bbox_h"])
            name = f"{row['image_path']} {','.join(map(str, region))}"
            regions[name] = (row["image_path"], region)
            counted = group not in symmetric if subset == "relation" else counts[group] >= FEWEST
            captions = (row["true_caption"], row["false_caption"])
            questions.append(([name], Choice((), captions, group=group if counted else "")))
        super().__init__(Path(root) / "images", questions, path)
        self._keys, self._regions = list(regions), [region for _, region in regions.values()]
        self.files = [self.root / file for file, _ in regions.values()]

    def image(self, index: int) -> Image.Image:
        return super().image(index).convert("RGB").crop(self._regions[index])

    def key(self, index: int) -> str:
        return self._keys[index]


def AROOrder(path: str, root: str) -> _ChoiceFiles:
    """ARO's COCO-Order and Flickr30k-Order: a caption, and the same caption in four other orders of its words.

    The authors do not publish the orders but draw them whenever their class is created. This reads a JSON file of its
    ``test_cases``: a list of mappings with ``image`` (a path below ``root``) and ``caption_options`` (the right caption
    first). An order that is the caption itself is no alternative.
    """
    questions = []
    for row in _rows(Path(path), image=str, caption_options=Annotated[list[str], Meta(min_length=1)]):
        right, *others = row["caption_options"]
        questions.append(([row["image"]], Choice((), (right, *(option for option in others if option != right)))))
    return _ChoiceFiles(Path(root), questions, Path(path))


def MMVPVLM(root: str) -> _ChoiceFiles:
    """MMVP-VLM: pairs of images that CLIP confuses, with a statement about each; groups are the nine visual patterns.

    ``root`` has ``Questions.csv`` and ``MLLM_VLM Images``.
    """
    path = find(Path(root), ("Questions.csv",), "Questions.csv")
    text = io.StringIO(read_text(path), newline="")
    with reading(path, "table", hint=AGAIN):
        rows = [cells for cells in csv.reader(text) if cells][1:]  # as in the authors' script, columns by position
    wrong = next((n for n, cells in enumerate(rows) if len(cells) != 3 or not cells[2].strip()), None)
    require(wrong is None, f"{path} row {wrong}: must have a number, a type and a statement; {AGAIN}")
    questions = []
    for first, second in zip(rows[::2], [*rows[1::2], []][: len(rows[::2])], strict=True):
        numbers = [whole_number(cells[0].strip()) if cells else None for cells in (first, second)]
        if None in numbers or [number % 2 for number in numbers if number is not None] != [1, 0]:
            raise InputError(f"{path}: {first[0]!r} is not the odd number of a pair with an even one; {AGAIN}")
        kind = first[1].strip()
        names = [f"{kind}/{number}.jpg" for number in numbers]
        questions.append((names, Choice((), (first[2].strip(), second[2].strip()), group=kind)))
    return _ChoiceFiles(Path(root) / "MLLM_VLM Images", questions, path)


def Winoground(root: str) -> _ChoiceFiles:
    """Winoground: two images and two captions with the same words; groups are the collapsed tags.

    ``root`` has ``examples.jsonl`` (or ``data`` with it), beside which ``images.zip`` is unpacked.
    """
    path = find(Path(root), ("data/examples.jsonl", "examples.jsonl"), "examples.jsonl")
    texts = dict.fromkeys(("image_0", "image_1", "caption_0", "caption_1"), str)
    questions = []
    for row in read_json_lines(path, entries({**texts, "collapsed_tag": NotRequired[Any]}, total=True)):
        names = [f"{row['image_0']}.png", f"{row['image_1']}.png"]
        group = str(row.get("collapsed_tag") or "")
        questions.append((names, Choice((), (row["caption_0"], row["caption_1"]), group=group)))
    return _ChoiceFiles(path.parent / "images", questions, path)


def WinoGAViL(root: str, candidates: Literal["5-6", "10-12"] | None = None) -> _ChoiceFiles:
    """WinoGAViL: choose which of 5 to 12 images are associated with a word.

    The caption is the word in lower case after "A" or "An", as in the authors' and DataComp's scripts. ``root`` has
    ``winogavil_dataset.csv`` and ``winogavil_images``. With ``candidates``, only questions of 5 and 6, or of 10 and 12
    images (DataComp's main metric).
    """
    path = find(Path(root), ("winogavil_dataset.csv",), "winogavil_dataset.csv")
    columns = {name: (name,) for name in ("cue", "candidates", "associations")}
    questions = []
    for number, row in enumerate(read_table(path, columns)):
        where = f"{path} row {number}"
        lists = []
        for name in ("candidates", "associations"):
            with reading(path, f"table: {name} of row {number}", hint=AGAIN):
                lists.append([str(each) for each in json.loads(row[name])])
        images, right = lists[0], set(lists[1])
        if candidates and (len(images) >= 10) != (candidates == "10-12"):
            continue
        names = sorted(images, key=lambda name: name not in right)  # the right ones first
        hits = sum(name in right for name in images)
        require(0 < hits < len(images), f"{where}: {hits} of {len(images)} candidates are associations; {AGAIN}")
        cue = row["cue"].lower()
        caption = f"{'An' if cue[:1] in 'aeiou' else 'A'} {cue}"
        questions.append(([f"{name}.jpg" for name in names], Choice((), (caption,), right=hits)))
    return _ChoiceFiles(Path(root) / "winogavil_images", questions, path)
