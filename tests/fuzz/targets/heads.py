"""Class heads: files with damaged bytes, changed facts, and other tensors; and tables of the examples for one."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from lit_clip.commands.class_examples import TABLES, read_examples
from lit_clip.errors import InputError
from lit_clip.heads import Head, load_head
from lit_clip.heads.head import HeadFacts
from lit_clip.models.fingerprint import fingerprint
from lit_clip.tools.reading import from_cell
from tests.fuzz.inputs import SECRET, Edit, Input, Inputs, Target, damaged, edited, edits
from tests.fuzz.targets.weights import HOSTILE, tiny_model

SHAPES = ((), (0,), (1,), (2,), (3,), (2, 16), (16, 2), (3, 0), (0, 3), (1, 3, 1))


@cache
def tiny_head() -> Head:
    """Return a head of the tiny model with three classes."""
    width, dimension = (features.shape[1] for features in tiny_model().image_features(torch.zeros(1, 3, 32, 32)))
    facts = HeadFacts(fingerprint(tiny_model()).model, ["cat", "dog", "tree"], ["a {}."], False, -1.0, 0.05, 30)
    torch.manual_seed(0)
    return Head(facts, torch.randn(dimension, 3), torch.randn(3, width), torch.randn(3), torch.full((3,), 0.5))


def _file(facts: object, tensors: dict[str, Tensor], form: str = "lit-clip head 1") -> Input:
    from safetensors.torch import save

    return Input("head.safetensors", save(tensors, {"format": form, "head": json.dumps(facts)}))


@cache
def whole_heads() -> dict[str, bytes]:
    """Return a head's file."""
    given = _file(asdict(tiny_head().facts), dict(tiny_head().state_dict()))
    return {given.name: given.data}


def _with_facts(changes: list[Edit]) -> Input:
    return _file(edited(asdict(tiny_head().facts), changes), dict(tiny_head().state_dict()))


def _with_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Input:
    tensor = torch.zeros(shape, dtype=dtype)
    odd = tensor if dtype == torch.bool else tensor + torch.tensor(value).to(dtype)
    return _file(asdict(tiny_head().facts), {**tiny_head().state_dict(), name: odd})


def head_inputs() -> Inputs:
    values = st.sampled_from((0.0, 1.0, float("nan"), float("inf"), 1e38))
    dtypes = st.sampled_from((torch.float32, torch.float16, torch.int64, torch.bool))
    names = st.sampled_from(("text", "weight", "bias", "thresholds", "other", "__metadata__", "../x"))
    tensors = st.builds(_with_tensor, names, st.sampled_from(SHAPES), dtypes, values)
    return st.one_of(damaged(whole_heads), st.builds(_with_facts, edits(HOSTILE)), tensors)


def read_head(folder: Path, given: Input) -> Iterator[str]:
    """Load a head, and classify an image by it."""
    path = folder / given.name
    path.write_bytes(given.data)
    head = load_head(path)
    try:
        found = tiny_model().with_head(head)(torch.zeros(1, 3, 32, 32))
    except InputError:  # it says that it is another model's
        yield "skipped"
        return
    assert found.shape == (1, len(head.facts.names)), found.shape
    assert head.none_of(found).shape == (1,)
    yield "used"


HEADS = (*[["image", "classes"]] * 4, ["classes", "image"], ["image", "note", "classes"], ["image", "classes", "image"])
ODD = (
    "cat",
    "cat",
    "dog",
    "Cat ; dog",
    "",
    ";",
    "cat;cat",
    "'=1",
    '"',
    "a\nb",
    "\x00",
    f"http://me:{SECRET}@host/a.png",
)


def example_inputs() -> Inputs:
    cell = st.one_of(st.sampled_from(ODD), st.text(max_size=3))
    one = cell.map(lambda each: [each])
    several = st.lists(st.one_of(one, one, one, st.lists(cell, min_size=1, max_size=3)), max_size=4)

    def make(suffix: str, head: list[str], rows: list[list[str]]) -> Input:
        file = io.StringIO()
        named = [[f"{number}.png", *row] if head[0] == "image" else row for number, row in enumerate(rows)]
        csv.writer(file, delimiter=TABLES[suffix]).writerows([head, *named])
        return Input(f"t{suffix}", file.getvalue().encode(errors="replace"))

    table = st.builds(make, st.sampled_from(sorted(TABLES)), st.sampled_from(HEADS), several)
    return st.one_of(table, table, damaged(lambda: {"t.csv": b"image,classes\n0.png,cat\n1.png,cat;dog\n"}))


def read_table(folder: Path, given: Input) -> Iterator[str]:
    """Read a table of examples: each image has the classes of its line, and no cell is left out."""
    (folder / given.name).write_bytes(given.data)
    found = read_examples(str(folder / given.name), None, "skip")
    text = io.StringIO((folder / given.name).read_text(encoding="utf-8-sig"))
    head, *rows = (row for row in csv.reader(text, delimiter=TABLES[Path(given.name).suffix]) if row)
    assert head.count("image") == head.count("classes") == 1, f"two columns of one name in {head}"
    wide = [row for row in rows if any(row[len(head) :])]
    assert not wide, f"cells of {wide[0]} were left out"
    cells = [dict(zip(head, map(from_cell, row), strict=False)) for row in rows]
    words = [{each.strip().casefold() for each in row.get("classes", "").split(";")} - {""} for row in cells]
    assert [file.key for file in found.files] == [row["image"] for row in cells]
    assert found.labels.ndim == 1 + any(len(each) > 1 for each in words)
    for label, expected in zip(found.labels, words, strict=True):
        places = label.nonzero()[:, 0].tolist() if label.ndim else [int(label)] if label >= 0 else []
        assert {found.names[place].casefold() for place in places} == expected
        yield "used"


heads = Target(head_inputs, read_head)
examples = Target(example_inputs, read_table)
