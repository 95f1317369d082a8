"""Hook of mkdocs: llms.txt, which lists the pages with the first sentence of each for programs that read the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.nav import Navigation

HEAD = "# {name}\n\n> {description}\n\nFor work on its code: [AGENTS.md](files/AGENTS.md.html).\n\n"
NO_TEXT = re.compile(r"^---\n.*?^---\n|^```.*?^```", re.DOTALL | re.MULTILINE)  # settings of a page, and code
NO_PARAGRAPH = re.compile(r"[#|!<-]|:::|\[[^]]*\]: ")  # how headings, tables, pictures, lists and definitions start
sentences: dict[str, str] = {}  # by the page's path
navigation: list[Navigation] = []


def on_nav(nav: Navigation, config: Any, files: Any) -> None:
    """Keep the navigation."""
    navigation[:] = [nav]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    """Keep a page's first sentence."""
    sentences[page.file.src_uri] = first_sentence(markdown)


def on_post_build(config: Any) -> None:
    """Write llms.txt."""
    text = HEAD.format(name=config.site_name, description=sentences["index.md"])
    Path(config.site_dir, "llms.txt").write_text(text + listing(navigation[0].items), encoding="utf-8")


def listing(items: list[Any]) -> str:
    """Return the entries of the navigation: a heading for each section, a line for each page."""
    lines = []
    for item in items:
        if item.children:
            lines.append(f"\n## {item.title}\n\n{listing(item.children)}")
        else:
            sentence = sentences.get(item.file.src_uri, "")
            lines.append(f"- [{item.title}]({item.url}){': ' if sentence else ''}{sentence}\n")
    return "".join(lines)


def first_sentence(markdown: str) -> str:
    """Return the first sentence of a page's first paragraph, without links; empty if it has no paragraph."""
    for block in NO_TEXT.sub("", markdown).split("\n\n"):
        if block.strip() and not NO_PARAGRAPH.match(block.lstrip()):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
            return re.split(r"(?<=[.!?]) (?=[A-Z`*])", text)[0]
    return ""
