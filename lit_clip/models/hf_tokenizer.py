"""Tokenizers of other models, run by Hugging Face's ``tokenizers`` from a single string that fits in a checkpoint."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.models.config import HuggingFaceTokenizerConfig
from lit_clip.models.tokenizer import TextTokenizer, checked_texts, repaired, unpadded_lengths
from lit_clip.tools.hub_client import hub_errors
from lit_clip.tools.reading import reason

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean(text: str, how: str) -> str:
    """Fix broken Unicode, undo HTML escapes (twice), then clean as :class:`HuggingFaceTokenizerConfig` describes.

    ``canonicalize`` is big_vision's, used to train SigLIP: punctuation is removed, ``_`` becomes a space.
    """
    text = repaired(text)
    if how == "canonicalize":
        text = text.translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


@dataclass(eq=False, repr=False)  # the definition has megabytes
class HuggingFaceTokenizer(TextTokenizer):
    """Turn texts into ids, padded on the right to the context length.

    Attributes:
        definition: the output of ``tokenizers.Tokenizer.to_str``.
        pad_id: id of the padding.
        clean: how texts are cleaned first, see :func:`clean`.
        context_length: ids per text.
        whole: whether the encoder attends to padding too, as SigLIP's does; no column may be trimmed then.
        stripped_id: id that is replaced by 0, see :class:`HuggingFaceTokenizerConfig`; None: none is.
    """

    definition: str
    pad_id: int
    clean: str
    context_length: int
    whole: bool
    stripped_id: int | None = None

    def __post_init__(self) -> None:
        self._tokenizer = Tokenizer.from_str(self.definition)
        self._tokenizer.enable_truncation(self.context_length)
        self._tokenizer.no_padding()
        self._uncut: Tokenizer | None = None

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = checked_texts(texts)
        result = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.long)
        for i, text in enumerate(texts):
            # One call per text: a batched call starts a thread pool, which does not survive the fork of data workers.
            ids = self._tokenizer.encode(clean(text, self.clean)).ids
            result[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return result if self.stripped_id is None else result.masked_fill_(result == self.stripped_id, 0)

    def count(self, text: str) -> int:
        if self._uncut is None:
            self._uncut = Tokenizer.from_str(self.definition)
            self._uncut.no_truncation()
            self._uncut.no_padding()
        return len(self._uncut.encode(clean(text, self.clean)).ids)

    def lengths(self, tokens: Tensor) -> Tensor:
        used = unpadded_lengths(tokens, self.pad_id).clamp(min=1)
        return torch.full_like(used, tokens.shape[1]) if self.whole else used

    def with_context(self, context_length: int) -> "HuggingFaceTokenizer":
        return replace(self, context_length=context_length)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        stripped = {} if self.stripped_id is None else {"stripped_id": self.stripped_id}
        return {"definition": self.definition, "pad_id": self.pad_id, **stripped}


def from_source(
    config: HuggingFaceTokenizerConfig, context_length: int, whole: bool, vocab_size: int
) -> HuggingFaceTokenizer:
    """Load the tokenizer of a hub name or a local folder, for an encoder with ``vocab_size`` embeddings."""
    from transformers import AutoTokenizer  # takes seconds

    where = f"architecture.text: the tokenizer at {config.source!r}"
    with hub_errors(f"architecture.text: no tokenizer at {config.source!r}"):
        loaded: Any = AutoTokenizer.from_pretrained(config.source, trust_remote_code=False)
    backend = _backend(loaded)
    if backend is None:
        advice = "save one with save_pretrained of its Fast class in transformers"
        raise InputError(f"{where} has no tokenizer.json; {advice}")
    require(loaded.pad_token_id is not None, f"{where} has no padding token")
    if backend.get_vocab().keys() <= set(loaded.all_special_tokens):  # transformers makes one without a word
        raise InputError(f"{where} has no vocabulary; its tokenizer.json, vocab.txt or spiece.model is missing")
    check_ids(backend, loaded.pad_token_id, vocab_size, where)
    stripped_id = loaded.sep_token_id if config.strip_sep_token else None
    require(not config.strip_sep_token or stripped_id is not None, f"{where} has no separator to strip")
    settings = (backend.to_str(), loaded.pad_token_id, config.clean, context_length, whole, stripped_id)
    return HuggingFaceTokenizer(*settings)


def check_ids(tokenizer: Tokenizer, pad_id: int, vocab_size: int, where: str) -> None:
    """Raise :class:`InputError` if a tokenizer returns ids outside its encoder's vocabulary, or fails on a text."""
    try:
        tokenizer.encode("a text \U0010ffff")  # one that no vocabulary has whole
    except Exception as error:  # `tokenizers` raises bare ones
        raise InputError(f"{where} cannot read texts ({reason(error)})") from error
    # Published models lack embeddings for some tokens that no text produces: <extra_id_0>, [unused0].
    words = [id for token, id in tokenizer.get_vocab().items() if not (token[:1] in "<[" and token[-1:] in ">]")]
    largest = max(pad_id, *words, 0)
    problem = f"has ids up to {largest}, but the encoder has {vocab_size}; it belongs to another model"
    require(largest < vocab_size, f"{where} {problem}")


def _backend(loaded: Any) -> Tokenizer | None:
    if hasattr(loaded, "backend_tokenizer"):
        return loaded.backend_tokenizer
    from transformers import SiglipTokenizer  # takes seconds

    if isinstance(loaded, SiglipTokenizer):  # a sentencepiece model like T5's, the only kind that transformers converts
        from transformers.convert_slow_tokenizer import T5Converter

        loaded._extra_ids = 0
        return T5Converter(loaded).converted()
    return None
