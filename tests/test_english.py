"""README, the guides and docstrings have short sentences, and none of the faults that were frequent in them."""

import ast
import re
from statistics import mean

import pytest

from tests.conftest import ROOT

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
MOST_WORDS = 16  # a page's average sentence
MOST_FIRST_WORDS = 14  # a package's average first line of a docstring
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FAULTS = {  # and what to write instead
    "those (?:of|that|with)": "the noun, or a possessive",
    "that of": "the noun, or a possessive",
    "whose": "with, or a second sentence",
    "what there is of": "the noun",
    "is (?:said|told)": "the message says",
    "told apart": "detected",
    "in place of": "instead of",
    "goes? on": "continue",
    "but for": "except for",
    "(?:others|another) than": "other ... than",
    "likewise": "too, or in the same way",
    "in the mean": "on average",
    "at hand": "available",
    "anew": "again",
    "stands? (?:for|in)": "means, is",
    "(?<!there )(?:is|are) no": "is not a",
    "by which": "a second sentence",
    "so many": "the number",
    "one's own": "your own",
    "the ones": "the noun",
}
NO_PROSE = r"^```.*?^```|^(?:!\[|    |\[\w+\]: )[^\n]*"  # code, pictures, addresses


def prose(name: str) -> str:
    """Return a page's text without code; of a link, its text."""
    text = re.sub(NO_PROSE, "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]+`", "`code`", text))


def sentences(text: str) -> list[str]:
    text = re.sub(r"^[|#].*", "", text, flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)
    return [each for part in parts for each in re.split(r"(?<=[.?!:])\s+", part) if re.search(r"\w", each)]


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name: str) -> None:
    assert mean(len(sentence.split()) for sentence in sentences(prose(name))) <= MOST_WORDS


def faults_in(text: str) -> list[str]:
    return [
        f"{text[max(0, match.start() - 40) : match.end() + 20]}: {better}"
        for fault, better in FAULTS.items()
        for match in re.finditer(rf"\b{fault}\b", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_none_of_the_frequent_faults(name: str) -> None:
    assert faults_in(" ".join(prose(name).split())) == []


@pytest.mark.parametrize("package", ["callbacks", "datamodules", "lit_clip"])
def test_docstrings_begin_with_a_short_sentence_that_has_none_of_the_faults(package: str) -> None:
    paths = (ROOT / package).rglob("*.py")
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, DOCUMENTED)]
    firsts = [re.sub(r"(:\w+:)?`+[^`]+`+", "code", text.partition("\n")[0]) for text in texts if text]
    assert mean(len(first.split()) for first in firsts) <= MOST_FIRST_WORDS
    assert [fault for first in firsts for fault in faults_in(first)] == []
