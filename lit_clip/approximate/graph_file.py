"""The check of a file of usearch's, which its reader in C++ would follow wherever the numbers in it lead."""

from pathlib import Path

import numpy as np

from lit_clip.tools.reading import reading

CONNECTIVITY = 32  # links of a node on each level but the lowest, where there are twice as many
AGAIN = "wait if lit-clip index is writing there, or else build another index under a new name"
NODES = 65_536  # checked at once
I8, U64, U32 = 23, 14, 15  # usearch's numbers for types
COUNTS = (
    "size",
    "connectivity",
    "lowest",
    "top",
    "entry",
)  # of nodes, links, links on level 0; highest level, first node
HEAD = np.dtype(
    [
        ("magic", "S7"),
        ("version", "<u2", 3),
        ("metric", "S1"),
        ("types", "u1", 3),
        ("present", "<u8"),
        ("deleted", "<u8"),
        ("dimensions", "<u8"),
        ("several", "u1"),
        ("unused", "V22"),
        *((name, "<u8") for name in COUNTS),
    ]
)
NODE = np.dtype([("row", "<u8"), ("level", "<i2")])  # before its links on levels 0, 1, ... level


def check_graph(path: Path, rows: int, dimensions: int) -> np.ndarray:
    """Return the memory-mapped bytes of a file that is a whole graph of so many rows, all of whose links lead to nodes.

    Its parts are: shape and int8 vectors ``[N, D]``, ``HEAD``, the nodes' levels, and the nodes with their links. All
    sizes follow from what is expected, none from the file. The vectors may be any: they decide only what is found.
    """
    with reading(path, "index", hint=AGAIN):
        content = np.memmap(path, dtype=np.uint8, mode="r")
        starts = np.cumsum([0, 8, rows * dimensions, HEAD.itemsize, 2 * rows])
        if len(content) < starts[-1]:
            raise ValueError("it ends too early, or is of other features")
        if content[:8].view("<u4").tolist() != [rows, dimensions]:
            raise ValueError(f"it is not of {rows:,} rows of {dimensions} numbers")
        levels = content[starts[3] : starts[4]].view("<i2")
        _check_head(content[starts[2] : starts[3]].view(HEAD)[0], rows, dimensions, levels)
        _check_nodes(content[starts[4] :], levels)
        return content


def _check_head(head: np.void, rows: int, dimensions: int, levels: np.ndarray) -> None:
    if head["magic"] != b"usearch" or head["version"][0] != 2:
        raise ValueError("it is no file of usearch 2")
    kinds = (head["metric"], *head["types"].tolist(), int(head["several"]))
    if kinds != (b"c", I8, U64, U32, 0):
        raise ValueError("its numbers are not compared as cosines of int8")
    found = tuple(int(head[name]) for name in ("present", "deleted", "dimensions", *COUNTS[:3]))
    if found != (rows, 0, dimensions, rows, CONNECTIVITY, 2 * CONNECTIVITY):
        raise ValueError(f"its head is not that of {rows:,} rows of {dimensions} numbers")
    top, entry = int(head["top"]), int(head["entry"])
    if entry >= rows or levels.min() < 0 or not levels.max() == levels[entry] == top:
        raise ValueError("its levels contradict each other")


def _check_nodes(nodes: np.ndarray, levels: np.ndarray) -> None:
    """Check bytes of nodes, one after the other, by their levels."""
    lowest, higher = _links(2 * CONNECTIVITY), _links(CONNECTIVITY)
    fixed = NODE.itemsize + lowest.itemsize
    ends = np.cumsum(fixed + higher.itemsize * levels.astype(np.int64))
    if len(nodes) != ends[-1]:
        raise ValueError("it ends too early or too late")
    starts, seen = np.concatenate([[0], ends[:-1]]), np.zeros(len(levels), dtype=bool)
    for first in range(0, len(levels), NODES):
        part = slice(first, first + NODES)
        heads = _read(nodes, starts[part], NODE)
        if not np.array_equal(heads["level"], levels[part]) or heads["row"].max() >= len(levels):
            raise ValueError("its nodes have other levels or rows than its head")
        seen[heads["row"]] = True
        _check_links(_read(nodes, starts[part] + NODE.itemsize, lowest), levels, 0)
    if not seen.all():
        raise ValueError("a row has two nodes")
    for level in range(1, int(levels.max()) + 1):
        on_level = starts[levels >= level] + fixed + (level - 1) * higher.itemsize
        _check_links(_read(nodes, on_level, higher), levels, level)


def _links(most: int) -> np.dtype:
    return np.dtype([("count", "<u4"), ("nodes", "<u4", most)])


def _read(content: np.ndarray, starts: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return the records of one kind that start at some bytes."""
    return content[starts[:, None] + np.arange(kind.itemsize)].view(kind)[:, 0]


def _check_links(links: np.ndarray, levels: np.ndarray, level: int) -> None:
    most = links["nodes"].shape[1]
    linked = links["nodes"][np.arange(most) < links["count"][:, None]]
    if links["count"].max() > most or (linked >= len(levels)).any() or (levels[linked] < level).any():
        raise ValueError("a link in it leads nowhere")
