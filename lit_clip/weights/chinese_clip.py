"""Chinese-CLIP in transformers' form: CLIP's image encoder, a BERT read at its first token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_clip.models.config import CLIPConfig
from lit_clip.weights.hugging_face_encoders import bert, clip_config, complete
from lit_clip.weights.hugging_face_keys import renamed, same_pairs, vision_pairs

CONTEXT = 52  # tokens of a text in its owner's code and training, of BERT's 512 positions


def read(
    values: Mapping[str, Any], state: Mapping[str, Tensor], preprocessor: Mapping[str, Any] | None, tokenizer: str
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Convert a ``ChineseCLIPModel``, whose tokenizer is at ``tokenizer``."""
    theirs = complete("ChineseCLIPConfig", values)
    length = min(CONTEXT, theirs.text_config.max_position_embeddings)
    text = bert(theirs.text_config, "bert", tokenizer, context_length=length)
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(state, "text.transformer.", "text_model."),
        *same_pairs(state, "text.proj.", "text_projection."),
    ]
    return clip_config(theirs, preprocessor, text), renamed(state, pairs, inwards=True)
