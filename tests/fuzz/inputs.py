"""Hostile inputs: damaged bytes, and trees of plain values in which a few values were changed."""

import copy
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

CANARY = "fuzz_canary"  # a module that lies beside every input; importing it is a finding
DEEP = "@deep@"  # a value written as 100,000 nested lists
DEPTH = 100_000
ALIASES = "@aliases@"  # a value written as lists of YAML that would hold 9^9 texts
SECRET = "c4nary-0f-the-fuzzer"  # in the environment; no message and no configuration may hold it
SECRET_NAME = "FUZZ_SECRET"
PLAN = "plan.json"  # an input that says which file is in the place of which
GO_ON = 0.9  # probability of a step deeper into a tree


class Input(NamedTuple):
    """A file given to the code.

    Attributes:
        name: of the file, or of the one it replaces; its suffix is the format.
        data: its content.
    """

    name: str
    data: bytes


Inputs = SearchStrategy[Input]


class Target(NamedTuple):
    """Code that reads somebody's file, and hostile files for it.

    Attributes:
        inputs: makes the strategy.
        run: reads an input in an empty working folder, and yields ``used`` or ``skipped`` for each of its samples. It
            raises :class:`lit_clip.errors.InputError` to refuse the input, and ``AssertionError`` for a wrong result.
        named: whether a refusal must name the file or the folder.
        own: whether the file is the user's own, who may start processes and name modules.
        bytewise: whether to minimise a finding by leaving out bytes, rather than by hypothesis.
    """

    inputs: Callable[[], Inputs]
    run: Callable[[Path, Input], Iterable[str]]
    named: bool = True
    own: bool = False
    bytewise: bool = False


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a damaged copy: bits flipped, bytes lost, overwritten or repeated, or another file's header."""
    kind, changed = rng.randrange(7), bytearray(data or b" ")
    if kind < 2:  # anywhere, or in the header
        for _ in range(rng.choice((1, 3, 10, 50))):
            changed[rng.randrange(len(changed) if kind else min(len(changed), 100))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 3:
        length, other = rng.choice((4, 12, 30, 200)), rng.choice(others)
        changed[:length] = other[:length]
    elif kind == 4:
        start = rng.randrange(len(changed))
        del changed[start : start + rng.choice((1, 5, 100))]
    elif kind == 5:
        start = rng.randrange(len(changed))
        changed[start : start + 8] = rng.choice((bytes(8), b"\xff" * 8, b"\x7f" * 8, rng.randbytes(8)))
    else:
        start = rng.randrange(len(changed))
        changed[start:start] = changed[rng.randrange(len(changed)) :][: rng.choice((1, 20, 500))]
    return bytes(changed)


def damaged(files: Callable[[], Mapping[str, bytes]]) -> Inputs:
    """Return intact files with damaged bytes."""

    def damage(name: str, seed: int) -> Input:
        data, rng = files()[name], random.Random(seed)
        for _ in range(rng.choice((1, 1, 1, 3))):
            data = mutated(data, list(files().values()), rng)
        return Input(name, data)

    return st.builds(damage, st.sampled_from(sorted(files())), st.integers(0, 2**64))


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """Return a zip archive whose content was changed, and its checksums with it: a member, its name, or the order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice((0, 0, rng.randrange(len(members))))  # the first describes all others
        kind, (name, content) = rng.randrange(8), members[place]
        if kind < 4:
            members[place] = name, mutated(content, [each for _, each in members], rng)
        elif kind == 4:
            members[place] = name, members[rng.randrange(len(members))][1]
        elif kind == 5 and len(members) > 1:
            del members[place]
        elif kind == 6:
            members.append((name, mutated(content, [content], rng)))
        else:
            members[place] = rng.choice(("x", "a/data.pkl", "../x", f"{name}x", name.upper(), f"x{name}")), content
    file, method = io.BytesIO(), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def damaged_members(files: Callable[[], Mapping[str, bytes]]) -> Inputs:
    """Return zip archives with damaged members and right checksums."""
    names = sorted(name for name, data in files().items() if zipfile.is_zipfile(io.BytesIO(data)))
    return st.builds(
        lambda name, seed: Input(name, rezipped(files()[name], random.Random(seed))),
        st.sampled_from(names),
        st.integers(0, 2**64),
    )


def odd_values(extra: tuple[Any, ...] = ()) -> SearchStrategy[Any]:
    """Return values that nobody expects, of all JSON's types."""
    numbers = (0, 1, -1, 2, 7, 1000, 2**31, 2**63, 2**70, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-320)
    words = (
        "",
        " ",
        "a",
        "nan",
        "0",
        "1e5",
        "true",
        "null",
        "a\nb",
        "\x00",
        "\x1b[31mred",
        "\u202eabc",
        "\ud800",
        "=1+1",
    )
    long = ("x" * 3000, "../" * 40 + "a", "a.b.C", "{}", "${oc.env:HOME}", "é" * 200, DEEP, ALIASES)
    trees: tuple[Any, ...] = ([], {}, [[]], [None], [0], ["a"], [1, 2, 3], {"": None}, {"a": 1}, [{}], {"a": {"b": []}})
    special = (None, True, False, float("nan"), float("inf"), float("-inf"))
    return st.one_of(
        st.sampled_from((*special, *numbers, *words, *long, *trees, *extra)),
        st.integers(-3, 100),
        st.floats(width=32),
        st.text(max_size=8),
        st.lists(st.integers(-2, 5), max_size=4),
    )


Path = tuple[Any, ...]
Edit = tuple[str, int, Any]  # what to do, at which of the tree's places, and with which value


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every value in a tree, the whole one first."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def edits(extra: tuple[Any, ...] = (), most: int = 3) -> SearchStrategy[list[Edit]]:
    """Return lists of changes for :func:`edited`."""
    kinds = st.sampled_from(("replace", "replace", "replace", "delete", "rename", "add", "repeat", "wrap"))
    return st.lists(st.tuples(kinds, st.integers(0, 10_000), odd_values(extra)), min_size=1, max_size=most)


def edited(tree: Any, changes: list[Edit]) -> Any:
    """Return a copy of a tree of plain values with changes."""
    tree = [copy.deepcopy(tree)]  # in a list, so that the whole can be replaced
    for kind, place, value in changes:
        if tree:
            *parents, key = _chosen(tree, place)
            parent = tree
            for step in parents:
                parent = parent[step]
            _change(parent, key, kind, copy.deepcopy(value))  # a later change may be within it
    return tree[0] if tree else None


def _chosen(tree: list[Any], place: int) -> Path:
    """Return a place: any of a tree's, or on a walk from its top, which large parts of it do not draw to themselves."""
    if place % 2:
        found = list(places(tree))[1:]
        return found[place // 2 % len(found)]
    rng, path, node = random.Random(place), (0,), tree[0]
    while isinstance(node, dict | list) and node and rng.random() < GO_ON:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path, node = (*path, key), node[key]
    return path


def _change(parent: Any, key: Any, kind: str, value: Any) -> None:
    old = parent[key]
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[value if isinstance(value, str) else json.dumps(value)] = parent.pop(key)
    elif kind == "add" and isinstance(old, dict):
        old[value if isinstance(value, str) else "new"] = value
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(old))
    elif kind == "wrap":
        parent[key] = [old]
    else:
        parent[key] = value


def to_json(tree: Any) -> bytes:
    """Write a tree as JSON, which is also YAML."""
    text = json.dumps(tree)
    lists = (f"&x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9))
    aliases = f"[&x0 [{', '.join('a' * 9)}], {', '.join(lists)}]"
    return text.replace(f'"{DEEP}"', "[" * DEPTH + "]" * DEPTH).replace(f'"{ALIASES}"', aliases).encode()


def edited_json(trees: Callable[[], Mapping[str, Any]], extra: tuple[Any, ...] = (), most: int = 3) -> Inputs:
    """Return JSON files in which values were changed."""

    def make(name: str, changes: list[Edit]) -> Input:
        return Input(name, to_json(edited(trees()[name], changes)))

    return st.builds(make, st.sampled_from(sorted(trees())), edits(extra, most))


def exchanged(names: Iterable[str], others: Iterable[str]) -> Inputs:
    """Return plans for :func:`placed`: some of a folder's files are gone, or others, or each the other of two."""
    own = st.sampled_from(sorted(names))
    plans = st.dictionaries(own, st.sampled_from(["", *sorted(names), *sorted(others)]), min_size=1, max_size=3)
    swaps = st.builds(lambda one, two: {one: two, two: one}, own, own)
    return st.one_of(plans, swaps).map(lambda plan: Input(PLAN, to_json(plan)))


def placed(given: Input, files: Mapping[str, bytes], others: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a folder's files, of which an input replaces one, or those that its plan names."""
    if given.name != PLAN:
        return {**files, given.name: given.data}
    pool, plan = {**files, **others}, json.loads(given.data)
    return {name: pool[plan.get(name, name)] for name in files if plan.get(name, name)}


def lines_of_json(records: Callable[[], list[Any]], name: str) -> Inputs:
    """Return files with a JSON object per line, in which values were changed."""

    def make(changes: list[Edit]) -> Input:
        tree = edited(records(), changes)
        return Input(name, b"\n".join(map(to_json, tree if isinstance(tree, list) else [tree])))

    return st.builds(make, edits())


def texts(name: str, most: int = 60) -> Inputs:
    """Return texts of any Unicode, some of them repeated many times."""
    pieces = st.one_of(
        st.text(max_size=20),
        st.sampled_from(("&", "&amp;", "&#0;", "&#xD800;", "<|endoftext|>", "\u0300", "\u200d", "ﷺ")),
    )
    repeated = st.builds(lambda text, times: (text * times)[:100_000], pieces, st.sampled_from((1, 2, 100, 10_000)))
    whole = st.lists(repeated, max_size=4).map("".join)
    return whole.map(lambda text: Input(name, text.encode("utf-8", "surrogatepass")))
