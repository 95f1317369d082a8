"""The documentation site: its pages and links; `make docs` builds it and fails on any warning of its parts."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def in_nav() -> list[str]:
    nav = SITE[SITE.index("\nnav:") :]  # without the tags of Python objects before it
    sections = yaml.safe_load(nav)["nav"]
    found = []
    for section in sections:
        for value in section.values():
            found += [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]
    return found


@pytest.fixture(scope="module")
def hook() -> Any:
    """The module of mkdocs' hook."""
    pytest.importorskip("mkdocs", reason="of the dev extra: make install")
    sys.path.insert(0, str(ROOT / "docs/hooks"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "docs/hooks"))
    return pages


def test_every_page_is_in_the_navigation_once() -> None:
    found = in_nav()
    assert len(found) == len(set(found))
    assert {*PAGES} <= {*found}


def test_pages_have_at_most_200_lines() -> None:
    pages = {name: len((ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()) for name in PAGES}
    assert {name: lines for name, lines in pages.items() if lines > 200} == {}


def test_every_metric_that_is_logged_by_a_fixed_name_is_on_the_page_of_metrics() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    code = [ROOT / "lit_clip/module.py", *sorted((ROOT / "callbacks").glob("*.py"))]
    text = "".join(file.read_text(encoding="utf-8") for file in code)
    named = set(re.findall(r'"((?:train|val|data)/\w+)"', text))
    assert len(named) > 10
    assert {name for name in named if f"`{name}`" not in page} == set()


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("training.md", "many_gpus.md#fsdp", "many_gpus.md#fsdp"),
        ("training.md", "#speed", "#speed"),
        ("finetuning.md", "../README.md#fine-tune", "index.md#fine-tune"),
        ("evidence/promises.md", "../../SECURITY.md", "../SECURITY.md"),
        ("extending.md", "../examples", "files/examples.md"),
        ("encoders.md", "../examples/own_encoder.py", "files/examples/own_encoder.py.md"),
        ("index.md", "docs/data.md", "data.md"),
        ("index.md", "configs/table.yaml", "files/configs/table.yaml.md"),
        ("index.md", "https://openmoji.org", "https://openmoji.org"),
        ("files/examples.md", "examples/train.py", "examples/train.py.md"),
        ("reference/lit_clip.md", "../losses.md", "../losses.md"),
    ],
)
def test_a_link_of_the_repository_leads_to_a_page_of_the_site(hook: Any, page: str, link: str, there: str) -> None:
    assert hook.links(f"see [it]({link}), too", page) == f"see [it]({there}), too"


def test_a_linked_file_is_shown_whole_and_a_folder_as_a_list(hook: Any) -> None:
    text = (ROOT / "examples/train.py").read_text(encoding="utf-8")
    assert f"```python\n{text.rstrip()}\n```" in hook.shown("examples/train.py")
    assert "- [train.py](examples/train.py)" in hook.shown("examples")


def test_an_option_stays_on_one_line_with_its_dashes_and_in_code_only(hook: Any) -> None:
    page = hook.on_page_content("<p>--no</p><code>fit --data.train a-b.csv -c x</code>", None, None, None)
    dashes = [f'<span class="unbroken">{start}</span>' for start in ("--d", "-c")]
    assert page == f"<p>--no</p><code>fit {dashes[0]}ata.train a-b.csv {dashes[1]} x</code>"


def test_pictures_of_light_and_dark_pages_follow_the_colours_of_the_site(hook: Any) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    shown = hook.on_page_markdown((ROOT / "README.md").read_text(encoding="utf-8"), page, None, None)
    names = re.findall(r'<img alt="[^"]+" src="images/(\w+)-(\w+).png#only-(\w+)">', shown)
    assert names == [(name, mode, mode) for name in ("search", "places") for mode in ("light", "dark")]
    assert "<picture>" not in shown


def test_what_a_cell_prints_in_a_row_is_one_block_and_nothing_is_none(hook: Any) -> None:
    """As rich prints: a display of its own for each line, with colours, some of them empty."""
    plain = [{"data": {"text/plain": [text]}} for text in ("", "\x1b[1mPlan\x1b[0m\n", " a  b\n")]
    outputs = [*plain, {"data": {"image/png": "AA", "text/plain": "<figure>"}}, {"text": ["  last\n"]}, plain[0]]
    cells = [{"cell_type": "code", "source": "fit()", "outputs": outputs}, {"cell_type": "markdown", "source": "# End"}]
    first, drawn, last = "```text\nPlan\n a  b\n```", "![](data:image/png;base64,AA)", "```text\n  last\n```"
    parts = ["```python\nfit()\n```", first, drawn, last, "# End"]
    assert hook._notebook({"cells": cells}) == "\n\n".join(parts) + "\n"


PAGE = """---
search: {exclude: true}
---
# Title

![A picture](a.png)

```bash
lit-clip fit

# Not a sentence.
```

It reads [tables](two.md), e.g. those of `fit`. More follows.
"""


def test_llms_txt_lists_the_pages_of_each_section_with_their_first_sentence(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="of the dev extra: make install")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Site\n\nIt trains models. Quickly.\n")
    (docs / "one.md").write_text(PAGE)
    (docs / "two.md").write_text("# Two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    nav = "[{Start: index.md}, {Guides: [{First: one.md}, {Second: two.md}]}]"
    settings = f"site_name: x\nuse_directory_urls: false\nhooks: [{ROOT}/docs/hooks/llms.py]\nnav: {nav}\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    build(load_config(str(tmp_path / "mkdocs.yml")))
    listed = (tmp_path / "site/llms.txt").read_text(encoding="utf-8")
    assert listed.startswith("# x\n\n> It trains models.\n")
    entries = ["- [First](one.html): It reads tables, e.g. those of `fit`.", "- [Second](two.html)"]
    assert listed.endswith("\n- [Start](index.html): It trains models.\n\n## Guides\n\n" + "\n".join(entries) + "\n")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="of the dev extra: make install")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    html = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(html) > 40
    for path, text in html.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r'(?:src|href)="?(?:https?:)?//', tag), f"{path}: {tag}"
    assert "LitCLIP" in html[tmp_path / "reference/lit_clip.html"]
    assert "--model.micro_batch_size" in re.sub("<[^>]*>", "", html[tmp_path / "reference/fit.html"])
    links = re.findall(r"^- \[.*?\]\((.*?)\)", (tmp_path / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert links == [page.replace(".md", ".html") for page in in_nav()]


def test_comments_beside_the_fields_of_a_class_are_its_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    griffe = pytest.importorskip("griffe", reason="of the dev extra: make install")
    monkeypatch.syspath_prepend(str(ROOT / "docs/hooks"))
    import docstrings  # pyright: ignore[reportMissingImports]

    extensions = griffe.load_extensions(docstrings.Roles)
    module = griffe.load("lit_clip.losses.loss", search_paths=[str(ROOT)], extensions=extensions)
    lines = module["Pairs"].docstring.value.splitlines()
    assert "    text: unit features ``[B, D]`` of their captions." in lines  # behind the field
    assert any(line.startswith("    negatives: hard negative captions; None if") for line in lines)  # above it
