"""MetaCLIP 2 in transformers' form: a CLIPModel with a multilingual tokenizer, pooled at the end of text."""

from lit_clip.models.config import HuggingFaceTokenizerConfig
from lit_clip.weights.hugging_face_encoders import Converted, Folder, clip_config, complete, text_transformer
from lit_clip.weights.hugging_face_keys import clip_pairs, renamed


def read(folder: Folder) -> Converted:
    """Convert a ``MetaClip2Model``."""
    theirs = complete("MetaClip2Config", folder.values)
    text, source = theirs.text_config, HuggingFaceTokenizerConfig(folder.tokenizer)
    encoder = text_transformer(text, pool="eos", eos_id=text.eos_token_id, tokenizer=source)
    pairs = clip_pairs(theirs.vision_config.num_hidden_layers, text.num_hidden_layers)
    return clip_config(theirs, folder.preprocessor, encoder), renamed(folder.state, pairs, inwards=True)
