"""AltCLIP in transformers' form: CLIP's image encoder, and an XLM-R with its first token, a norm and two layers."""

from lit_clip.weights.hugging_face_encoders import Converted, Folder, bert, clip_config, complete
from lit_clip.weights.hugging_face_keys import renamed, same_pairs, vision_pairs
from lit_clip.weights.hugging_face_processor import agree

CONTEXT = 77  # tokens of a text in its training, of XLM-R's 512 positions


def read(folder: Folder) -> Converted:
    """Convert an ``AltCLIPModel``."""
    theirs = complete("AltCLIPConfig", folder.values)
    text = theirs.text_config
    agree("text_config.project_dim", text.project_dim, theirs.projection_dim)
    agree("text_config.layer_norm_eps", text.layer_norm_eps, 1e-5)
    # Releases of transformers disagree whether blocks are `layer` or `layers`.
    state = {_plural(name): tensor for name, tensor in folder.state.items()}
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(state, "text.transformer.", "text_model.roberta."),
        *same_pairs(state, "text.proj.0.", "text_model.pre_LN."),
        *same_pairs(state, "text.proj.1.", "text_model.transformation."),
        *same_pairs(state, "text.proj.2.", "text_projection."),
    ]
    length = min(CONTEXT, text.max_position_embeddings - text.pad_token_id - 1)
    encoder = bert(text, "xlm-roberta", folder.tokenizer, context_length=length, projection="norm")
    return clip_config(theirs, folder.preprocessor, encoder), renamed(state, pairs, inwards=True)


def _plural(name: str) -> str:
    texts = name.startswith("text_model.")
    return name.replace(".layers.", ".layer.") if texts else name.replace(".layer.", ".layers.")
