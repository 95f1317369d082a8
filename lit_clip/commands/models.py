"""``lit-clip models``: list model names with size and cost."""

from fnmatch import fnmatch

from rich import box
from rich.table import Column, Table

from lit_clip.errors import require
from lit_clip.models.flops import measure
from lit_clip.models.registry import list_models, resolve_architecture
from lit_clip.tools.console import Console, progress


def models(patterns: list[str], *, pretrained: bool = False) -> None:
    """List the models that can be created by name, or published weights.

    FLOPs are for one image and one text of full length. A multiply-add counts as two, as in the tables that give
    ViT-B/32 8.82 + 5.96 GFLOPs; normalisation, activations and softmax do not count. Those tables have 2 to 5 % more
    for the ResNets: their attention pooling computes every position, ours only the one that is used.

    Args:
        patterns: list only names that contain one of these (* and ? match anything); by default all.
        pretrained: list open_clip's registry of published weights instead, in the form that lit_clip.load_model takes;
            it refuses those of model kinds that lit-clip lacks.
    """
    if pretrained:
        import open_clip  # takes seconds

        names = [f"{model}:{tag}" for model, tag in open_clip.list_pretrained()]
    else:
        names = list_models()
    wanted = [f"*{pattern.lower()}*" for pattern in patterns or [""]]
    names = [name for name in names if any(fnmatch(name.lower(), pattern) for pattern in wanted)]
    require(bool(names), f"no {'weights' if pretrained else 'model'} named {' or '.join(patterns)}")
    console = Console(file_width=120)
    if pretrained:
        for name in names:
            console.print(name, soft_wrap=True)
        return
    titles = ["image\nM", "text\nM", "total\nM", "pixels", "tokens", "embed\ndim", "image\nGFLOPs", "text\nGFLOPs"]
    columns = Column("model", overflow="fold"), *(Column(title, justify="right", no_wrap=True) for title in titles)
    caption = "M: millions of parameters; a multiply-add counts as two FLOPs"
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=caption)
    with progress("models", len(names)) as advance:
        for name in names:
            table.add_row(name, *measure(resolve_architecture(name)).cells())
            advance(1)
    console.print(table)
