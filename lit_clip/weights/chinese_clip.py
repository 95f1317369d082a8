"""Chinese-CLIP in transformers' form: CLIP's image encoder, and a BERT with its first token."""

from lit_clip.weights.hugging_face_encoders import Converted, Folder, bert, clip_config, complete
from lit_clip.weights.hugging_face_keys import renamed, same_pairs, vision_pairs

CONTEXT = 52  # tokens of a text in its owner's code and training, of BERT's 512 positions


def read(folder: Folder) -> Converted:
    """Convert a ``ChineseCLIPModel``."""
    theirs = complete("ChineseCLIPConfig", folder.values)
    length = min(CONTEXT, theirs.text_config.max_position_embeddings)
    text = bert(theirs.text_config, "bert", folder.tokenizer, context_length=length)
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(folder.state, "text.transformer.", "text_model."),
        *same_pairs(folder.state, "text.proj.", "text_projection."),
    ]
    return clip_config(theirs, folder.preprocessor, text), renamed(folder.state, pairs, inwards=True)
