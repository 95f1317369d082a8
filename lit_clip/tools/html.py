"""Pages from Jinja2 templates. An HTML page is one file: it contains its images, and fetches nothing."""

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_clip.errors import require
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import plural
from lit_clip.tools.images import decoding_at_least, open_image

if TYPE_CHECKING:
    import jinja2

SHARED = Path(__file__).parent / "templates"
THUMBNAIL = 160  # pixels of the longer side


def render(template: Path, **values: Any) -> str:
    """Fill in a template; it may use templates beside it and the shared ``base.html`` and ``macros.html``.

    Text from ``values`` is escaped in HTML, secrets are hidden, and a missing value is an error.
    """
    return without_secrets(_environment(template.parent).get_template(template.name).render(values))


@lru_cache  # it keeps the compiled templates, whose compilation takes longer than most pages
def _environment(folder: Path) -> "jinja2.Environment":
    import jinja2  # here, because `lit-clip --help` must start fast

    loader = jinja2.FileSystemLoader([folder, SHARED])
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plural=plural, thousands="{:,}".format)
    return environment


def page_path(option: str, typed: str) -> Path:
    """Return the path of a page to write, after checking the typed name and its folder."""
    page = Path(typed)
    require(page.suffix == ".html", f"--{option} {typed}: must be a .html file")
    require(page.absolute().parent.is_dir(), f"--{option} {typed}: there is no such folder")
    return page


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write a page; see :func:`render`."""
    with replacing(path) as temporary:
        temporary.write_text(render(template, **values), encoding="utf-8", errors="replace")


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> str:
    """Return a JPEG of at most ``size`` pixels a side as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def stored_thumbnail(data: bytes, where: str) -> str:
    """Return :func:`thumbnail` of a file's bytes, decoded no larger than needed."""
    with decoding_at_least(lambda width, height: (min(width, THUMBNAIL), min(height, THUMBNAIL))):
        return thumbnail(open_image(io.BytesIO(data), where))
