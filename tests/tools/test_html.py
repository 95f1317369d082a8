"""HTML pages: text is escaped, missing values are errors, and characters that cannot be encoded are replaced."""

from pathlib import Path

import jinja2
import pytest

from lit_clip.tools.console import plural
from lit_clip.tools.html import render, write_page


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(
        '{% extends "base.html" %}{% from "macros.html" import table %}'
        "{% block body %}{{ table(rows, [title, 'count'], ['count']) }}{% endblock %}"
    )
    return path


def test_text_is_escaped_in_the_layout_and_in_macros(template: Path) -> None:
    page = render(template, title="<b>&", rows=[("<script>", 1)])
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert '<tr><td>&lt;script&gt;</td><td class="n">1</td></tr>' in page
    assert "<script" not in page


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        render(template, title="a page")


def test_a_lone_surrogate_is_replaced(template: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "out.html", template, title="\udcff", rows=[])
    assert "<title>?</title>" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_plural_adds_an_s_except_for_one() -> None:
    assert [plural(count, "image") for count in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
