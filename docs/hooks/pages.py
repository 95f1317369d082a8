"""Hook of mkdocs: pages from files outside of docs/ and from the code, and links between all of them."""

import json
import os
import re
import sys
from itertools import groupby
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Markdown's links and images, and the images of HTML's <picture>.
LINK = re.compile(r"""(?:(?<=\]\()|(?<=src=")|(?<=srcset="))(?!\w+:)([^)"#\s]+)(#[^)"\s]*)?(?=[)"])""")
TEXTS = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
TEXTS |= {name: name for name in ("SECURITY.md", "CODE_OF_CONDUCT.md")}
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">'
    r'\s*<img ([^>]*)src="([^"]+)">\s*</picture>'
)
CODE = re.compile(r"<code\b.*?</code>", re.DOTALL)
OPTION = re.compile(r"(?<=[\s>(\[|])--?[A-Za-z]")  # its start, after which a browser may break the line
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n"  # guides should be found first
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", "Makefile": "make"}
NOTEBOOK = ".ipynb"


def on_files(files: Files, config: Any) -> Files:
    """Add README.md and its like, the reference, and a page for each file or folder that a page links to."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import reference  # not above, since it imports torch

    pages = {name: (ROOT / source).read_text(encoding="utf-8") for source, name in TEXTS.items()}
    pages |= reference.pages()
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()} | pages
    wanted = {target for uri, text in texts.items() for target in _outside(uri, text)} | {"LICENSE"}
    while wanted:
        target = wanted.pop()
        page = _shown(target)
        if page not in pages:
            pages[page] = shown(target)
            wanted |= set(_outside(page, pages[page]))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to the pages of this site, and pictures follow its colours, which need not be the system's."""
    both = r'<img \2src="\3#only-light"><img \2src="\1#only-dark">'
    return links(PICTURE.sub(both, markdown), page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Keep the dashes of options and what follows them on one line."""
    return CODE.sub(lambda code: OPTION.sub(r'<span class="unbroken">\g<0></span>', code[0]), html)


def links(markdown: str, uri: str) -> str:
    """Replace links to files of the repository by links to the site's pages.

    Args:
        markdown: with links relative to the file in the repository, as a code host reads them.
        uri: of the page in the site.
    """
    here = dirname(uri)

    def link(found: re.Match[str]) -> str:
        target = _target(uri, found[1])
        return relpath(_page(target), here or ".") + (found[2] or "")

    return LINK.sub(link, markdown)


def _target(uri: str, link: str) -> str:
    """Return the path in the repository that a page's link means."""
    return normpath(os.path.join(dirname(_source(uri)), link))


def _source(uri: str) -> str:
    """Return the path in the repository that stands for a page of the site."""
    if uri.startswith("files/"):
        return uri.removeprefix("files/").removesuffix(".md")
    return {page: source for source, page in TEXTS.items()}.get(uri, f"docs/{uri}")


def _page(target: str) -> str:
    """Return the page of a path in the repository."""
    if target in TEXTS:
        return TEXTS[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else _shown(target)


def _shown(target: str) -> str:
    return f"files/{target}.md"


def _outside(uri: str, text: str) -> list[str]:
    """Return the paths in the repository, without a page of their own, that a page links to."""
    targets = [_target(uri, found[1]) for found in LINK.finditer(text)]
    return [target for target in targets if _page(target) == _shown(target)]


def shown(target: str) -> str:
    """Return a page with the text of a file, or with links to the files of a folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = ROOT / target
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.suffix in (*LANGUAGES, NOTEBOOK))
        return f"{UNSEARCHED}# {target}/\n\n" + "".join(f"- [{name}]({path.name}/{name})\n" for name in names)
    if path.suffix == NOTEBOOK:
        return UNSEARCHED + _notebook(json.loads(path.read_text(encoding="utf-8")))
    language = LANGUAGES.get(path.suffix or path.name, "text")
    return f"{UNSEARCHED}# {target}\n\n```{language}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"


def _notebook(book: dict[str, Any]) -> str:
    """Return a notebook's cells and what they printed and drew."""
    parts: list[str] = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        outputs = [output.get("data", {"text/plain": output.get("text", "")}) for output in cell.get("outputs", [])]
        for drawn, of_kind in groupby(outputs, key=lambda output: "image/png" in output):
            if drawn:
                parts += [f"![](data:image/png;base64,{''.join(data['image/png']).strip()})" for data in of_kind]
                continue
            printed = "\n".join("".join(data.get("text/plain", "")).rstrip("\n") for data in of_kind)
            printed = re.sub(r"\x1b\[[\d;]*m", "", printed)  # colours of a terminal
            if printed.strip():
                parts.append(f"```text\n{printed.strip(chr(10))}\n```")
    return "\n\n".join(parts) + "\n"
