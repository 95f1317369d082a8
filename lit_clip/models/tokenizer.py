"""CLIP's byte-pair encoding on Hugging Face ``tokenizers``.

The vocabulary is the file that ``open-clip-torch`` installs; cleaning, splitting and special tokens follow the paper's
code, so ids equal OpenAI's for any text, and open_clip's (which spells the special tokens differently).
"""

import gzip
import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ftfy
import numpy as np
import regex
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.tools.own_files import installed_file

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
SOT_ID, EOT_ID = 49406, 49407
PIECE = 2048  # characters cleaned at once: for "&amp;amp;amp;..." ftfy's time grows with their square
MOST_READ = 65_536  # characters of a text that are read
CACHED_WORDS, LONGEST_CACHED = 32_768, 16  # words and their characters: 7 MB a process for English, at most 50
MERGES = 49152 - 256 - 2  # of the file's 262,145 lines (OpenAI's code)

_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def bytes_to_unicode() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte, in CLIP's order of ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


@lru_cache(maxsize=1)
def byte_pair_tokenizer() -> Tokenizer:
    """Build CLIP's byte-pair encoding for texts that are already cleaned and split."""
    merges_file = installed_file("open_clip", "open-clip-torch", "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(merges_file, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]  # the first line is a version
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START_OF_TEXT, END_OF_TEXT]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.add_special_tokens([AddedToken(START_OF_TEXT, special=True), AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def repaired(text: str) -> str:
    """Fix broken Unicode and undo HTML escapes (twice), in time linear in the length of the text.

    Up to ``PIECE`` characters this is the paper's cleaning; a longer text is cleaned in pieces that end at white space,
    and what follows ``MOST_READ`` characters is left out.
    """
    text = text[:MOST_READ]
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # as most captions: nothing that could be broken or escaped
    return "".join(html.unescape(html.unescape(ftfy.fix_text(piece))) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most ``PIECE`` characters, after the last space or line break if possible."""
    start = 0
    while len(text) - start > PIECE:
        stop = start + PIECE
        cut = 1 + max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
        stop = cut if cut > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def clean(text: str) -> str:
    """Clean as the paper does: :func:`repaired`, then collapse white space and lower-case."""
    return " ".join(repaired(text).split()).lower()


def encode(text: str) -> list[int]:
    """Return the ids of a text, without start and end."""
    ids: list[int] = []
    for word in _WORDS.findall(clean(text)):
        ids += _cached_word(word) if len(word) <= LONGEST_CACHED else _encode_word(word)
    return ids


def _encode_word(word: str) -> list[int]:
    # One call per word: a batched call starts a thread pool, which does not survive the fork of data workers.
    return byte_pair_tokenizer().encode([word], is_pretokenized=True, add_special_tokens=False).ids


_cached_word = lru_cache(CACHED_WORDS)(_encode_word)


def decode(tokens: Sequence[int]) -> str:
    """Return the text of ids up to the first end-of-text token."""
    ids = list(tokens)
    ids = ids[: ids.index(EOT_ID)] if EOT_ID in ids else ids
    return byte_pair_tokenizer().decode(ids, skip_special_tokens=True).strip()


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = True) -> Tensor:
    """Turn texts into ids, int64 ``[N, context_length]``: start of text, the words, end of text, zeros.

    A longer text is truncated, its last id is then the end of text; or refused, if not ``truncate``.
    """
    problem = f"{context_length} must be at least 2, for the start and the end of a text"
    require(context_length >= 2, f"context_length: {problem}")
    texts = checked_texts(texts)
    result = np.zeros((len(texts), context_length), dtype=np.int64)  # filled three times as fast as a tensor
    for i, text in enumerate(texts):
        ids = [SOT_ID, *encode(text), EOT_ID]
        if len(ids) > context_length:
            require(truncate, f"text {i} has {len(ids)} tokens, {context_length} fit: {text[:60]!r}...")
            ids = [*ids[: context_length - 1], EOT_ID]
        result[i, : len(ids)] = ids
    return torch.from_numpy(result)


def checked_texts(texts: str | Sequence[str]) -> list[str]:
    """Return one text or several as a list of strings."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        require(isinstance(text, str), f"text {i} is a {type(text).__name__}, not a string: {text!r}")
    return texts


def unpadded_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """int64 ``[N, L]`` -> ``[N]``: columns up to the last token that is not padding."""
    columns = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != pad_id) * columns).amax(dim=1)


class TextTokenizer(ABC):
    """A model's tokenizer, picklable so that data workers can receive it."""

    context_length: int
    pad_id: int

    @abstractmethod
    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 ``[N, context_length]``; longer ones are truncated."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Count the ids of a text before truncation, including start and end."""

    @abstractmethod
    def lengths(self, tokens: Tensor) -> Tensor:
        """int64 ``[N, L]`` -> ``[N]``: the number of columns of each text that the encoder needs."""

    @abstractmethod
    def with_context(self, context_length: int) -> "TextTokenizer":
        """Return the same tokenizer for another context length."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""

    def trim(self, tokens: Tensor) -> Tensor:
        """Drop columns that no text needs: ``[N, L]`` -> ``[N, longest]``; features do not change."""
        return tokens[:, : int(self.lengths(tokens).max())] if len(tokens) else tokens


@dataclass(frozen=True)
class CLIPTokenizer(TextTokenizer):
    """:func:`tokenize` for one context length.

    At most ``padding_read`` padding tokens behind a text are read by its encoder; they may not be trimmed.
    """

    context_length: int = 77
    pad_id: int = 0
    padding_read: int = 0

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        return tokenize(texts, self.context_length)

    def count(self, text: str) -> int:
        return len(encode(text)) + 2

    def lengths(self, tokens: Tensor) -> Tensor:
        ends = tokens.argmax(dim=-1) + 1  # the (first) end of text has the highest id
        if self.padding_read:  # then all is read up to the padding, also behind an end of text within the caption
            ends = unpadded_lengths(tokens, self.pad_id)
        return (ends + self.padding_read).clamp(max=tokens.shape[1])

    def with_context(self, context_length: int) -> "CLIPTokenizer":
        return replace(self, context_length=context_length)

    def decode(self, tokens: Sequence[int]) -> str:
        return decode(tokens)


class CallableTokenizer(TextTokenizer):
    """Your own tokenizer: any callable that turns a list of texts into int64 ``[N, context_length]``.

    It is picklable, as data workers receive it; if it has ``pad_id`` or ``decode`` they are used.
    """

    def __init__(self, function: Callable[[list[str]], Tensor], context_length: int) -> None:
        self.function, self.context_length = function, context_length
        self.pad_id = int(getattr(function, "pad_id", 0))

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = checked_texts(texts)
        return self.function(texts) if texts else torch.zeros(0, self.context_length, dtype=torch.long)

    def count(self, text: str) -> int:
        """Count the tokens after truncation: the number before is unknown."""
        return int(self.lengths(self([text]))[0])

    def lengths(self, tokens: Tensor) -> Tensor:
        return unpadded_lengths(tokens, self.pad_id).clamp(min=1)

    def with_context(self, context_length: int) -> TextTokenizer:
        if context_length == self.context_length:
            return self
        own = self.context_length
        raise InputError(f"context_length: this tokenizer's is {own}; set it in the encoder's init_args")

    def decode(self, tokens: Sequence[int]) -> str:
        ids = [token for token in tokens if token != self.pad_id]
        decode: Any = getattr(self.function, "decode", None)
        return str(decode(ids)) if decode else " ".join(map(str, ids))
