"""``lit-clip models``: what can be made, and what it takes."""

from fnmatch import fnmatch

from rich import box
from rich.console import Console
from rich.table import Table

from lit_clip.errors import require
from lit_clip.models.flops import measure
from lit_clip.models.registry import list_models, resolve_architecture
from lit_clip.tools.console import progress


def models(patterns: list[str], *, pretrained: bool = False) -> None:
    """List the models that can be made by name, or published weights.

    A multiplication with its addition counts as two FLOPs, for one image and one text of full length, as in the
    tables that give ViT-B/32 8.82 + 5.96 GFLOPs; normalisation, activations and softmax are not counted. Those tables
    have 2 to 5 % more for the ResNets: their attention pooling computes every position, ours the one that is used.

    Args:
        patterns: only names that contain one of these (* and ? match anything); none: all.
        pretrained: list open_clip's registry of published weights instead, as lit_clip.load_model takes them; those
            of a kind that lit-clip lacks are refused there by name.
    """
    names = _registry() if pretrained else list_models()
    names = [name for name in names if not patterns or any(matches(name, pattern) for pattern in patterns)]
    require(bool(names), f"no {'weights' if pretrained else 'model'} called {' or '.join(patterns)}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file has room
    if pretrained:
        for name in names:
            console.print(name, markup=False, soft_wrap=True)
        return
    table = Table(
        box=box.SIMPLE_HEAD, caption="M: millions of parameters; a multiplication with its addition: two FLOPs"
    )
    table.add_column("model", overflow="fold")
    for column in (
        "image\nM",
        "text\nM",
        "total\nM",
        "pixels",
        "tokens",
        "embed\ndim",
        "image\nGFLOPs",
        "text\nGFLOPs",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    with progress("models", len(names)) as advance:
        for name in names:
            table.add_row(name, *measure(resolve_architecture(name)).cells())
            advance(1)
    console.print(table)


def _registry() -> list[str]:
    import open_clip

    return [f"{model}:{tag}" for model, tag in open_clip.list_pretrained()]


def matches(name: str, pattern: str) -> bool:
    """Whether the name contains the pattern, letter case aside."""
    return fnmatch(name.lower(), f"*{pattern.lower()}*")
