"""MetaCLIP 2 in transformers' form: a CLIPModel with a tokenizer of many languages, read at the end of text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_clip.models.config import CLIPConfig, HuggingFaceTokenizerConfig
from lit_clip.weights.hugging_face_encoders import clip_config, complete, text_transformer
from lit_clip.weights.hugging_face_keys import clip_pairs, renamed


def read(
    values: Mapping[str, Any], state: Mapping[str, Tensor], preprocessor: Mapping[str, Any] | None, tokenizer: str
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Convert a ``MetaClip2Model``, whose tokenizer is at ``tokenizer``."""
    theirs = complete("MetaClip2Config", values)
    text, source = theirs.text_config, HuggingFaceTokenizerConfig(tokenizer)
    ours = clip_config(
        theirs, preprocessor, text_transformer(text, pool="eos", eos_id=text.eos_token_id, tokenizer=source)
    )
    pairs = clip_pairs(theirs.vision_config.num_hidden_layers, text.num_hidden_layers)
    return ours, renamed(state, pairs, inwards=True)
