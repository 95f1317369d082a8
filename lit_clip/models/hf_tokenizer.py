"""Other models' tokenizers, run by Hugging Face's ``tokenizers`` from one string that a checkpoint can hold."""

import html
import string
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.models.config import HuggingFaceTokenizer
from lit_clip.models.tokenizer import TextTokenizer

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean(text: str, how: str) -> str:
    """Fix broken Unicode, undo HTML escapes (twice), and what :class:`HuggingFaceTokenizer` says beyond that.

    ``canonicalize`` is big_vision's, with which SigLIP was trained: punctuation goes, ``_`` becomes a space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


class HuggingFaceTokenize(TextTokenizer):
    """Texts to ids, padded to the context length on the right.

    Args:
        definition: what ``tokenizers.Tokenizer.to_str`` gives.
        pad_id: of the padding.
        clean: how texts are cleaned before.
        context_length: ids of a text.
        whole: whether the encoder attends to padding too, as SigLIP's does: then no column may be trimmed.
    """

    def __init__(self, definition: str, pad_id: int, clean: str, context_length: int, whole: bool) -> None:
        self.definition, self.pad_id, self.clean, self.whole = definition, pad_id, clean, whole
        self.context_length = context_length
        self._tokenizer = Tokenizer.from_str(definition)
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.no_padding()
        self._uncut: Tokenizer | None = None

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        result = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.long)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}, not a string: {text!r}")
            # One call a text: a batched one starts a thread pool, which does not survive the fork of data workers.
            ids = self._tokenizer.encode(clean(text, self.clean)).ids
            result[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return result

    def count(self, text: str) -> int:
        if self._uncut is None:
            self._uncut = Tokenizer.from_str(self.definition)
            self._uncut.no_truncation()
            self._uncut.no_padding()
        return len(self._uncut.encode(clean(text, self.clean)).ids)

    def lengths(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        used = (tokens != self.pad_id) * positions
        return torch.full_like(used[:, 0], tokens.shape[1]) if self.whole else used.amax(dim=1).clamp(min=1)

    def with_context(self, context_length: int) -> "HuggingFaceTokenize":
        return HuggingFaceTokenize(self.definition, self.pad_id, self.clean, context_length, self.whole)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"definition": self.definition, "pad_id": self.pad_id}


def from_source(config: HuggingFaceTokenizer, context_length: int, whole: bool, vocab_size: int) -> HuggingFaceTokenize:
    """The tokenizer of a hub name or a local folder.

    Args:
        config: where it is.
        context_length: see :class:`HuggingFaceTokenize`.
        whole: likewise.
        vocab_size: number of ids that the encoder knows.

    Raises:
        InputError: none there, or one that ``tokenizers`` cannot run, that has no padding, or that has ids which the
            encoder does not know.
    """
    from transformers import AutoTokenizer

    where = f"architecture.text: the tokenizer at {config.source!r}"
    try:
        loaded: Any = AutoTokenizer.from_pretrained(config.source, trust_remote_code=False)
    except Exception as error:  # whatever reading a damaged or foreign file raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"architecture.text: no tokenizer at {config.source!r} ({reason})") from error
    backend = _backend(loaded)
    if backend is None:
        raise InputError(
            f"{where} has no tokenizer.json form; save it as one (transformers' save_pretrained of its Fast class)"
        )
    if loaded.pad_token_id is None:
        raise InputError(f"{where} has no padding token")
    # Published models lack some of the tokens that no text is made of: <extra_id_0>, [unused0].
    words = [id for token, id in backend.get_vocab().items() if not (token[0] in "<[" and token[-1] in ">]")]
    largest = max(loaded.pad_token_id, *words)
    if largest >= vocab_size:
        raise InputError(f"{where} has ids up to {largest}, the encoder has {vocab_size}; it belongs to another model")
    return HuggingFaceTokenize(backend.to_str(), loaded.pad_token_id, config.clean, context_length, whole)


def _backend(loaded: Any) -> Tokenizer | None:
    """What a tokenizer of transformers runs on, if ``tokenizers`` can run it."""
    if hasattr(loaded, "backend_tokenizer"):
        return loaded.backend_tokenizer
    from transformers import SiglipTokenizer

    if isinstance(loaded, SiglipTokenizer):  # a sentencepiece model made as T5's is; transformers converts that alone
        from transformers.convert_slow_tokenizer import T5Converter

        loaded._extra_ids = 0
        return T5Converter(loaded).converted()
    return None
