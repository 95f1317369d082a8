"""AIMv2-LiT, GroupViT and ALIGN in transformers' form: all image encoders, and AIMv2's and GroupViT's for texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.models.config import CLIPConfig, HuggingFaceImageConfig, HuggingFaceTextConfig, Preprocessing
from lit_clip.models.external import GROUPVIT_RATIO
from lit_clip.models.tokenizer import EOT_ID
from lit_clip.weights.hugging_face_encoders import Converted, Folder, bert, complete, plain
from lit_clip.weights.hugging_face_keys import renamed, same_pairs
from lit_clip.weights.hugging_face_processor import agree, check_vocabulary, preprocessing_of, square

ALIGN_CONTEXT = 64  # tokens of a text in its training, of BERT's 512 positions
# Pixels from -1 to 1, by EfficientNet's processor.
ALIGN_SCALE = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False}


def read(folder: Folder) -> Converted:
    """Convert an ``Aimv2Model``, a ``GroupViTModel`` or an ``AlignModel``."""
    return _align(folder) if folder.values["model_type"] == "align" else _in_clip_tokens(folder)


def _in_clip_tokens(folder: Folder) -> Converted:
    groups, state = folder.values["model_type"] == "groupvit", folder.state
    theirs = complete("GroupViTConfig" if groups else "Aimv2Config", folder.values)
    image, text, dim = theirs.vision_config, theirs.text_config, theirs.projection_dim
    if groups:
        agree("projection_intermediate_dim", theirs.projection_intermediate_dim, GROUPVIT_RATIO * dim)
    else:
        agree("vision_config.use_head", image.use_head, True)
    if not groups or text.eos_token_id != 2:  # with which GroupViT reads the highest id
        agree("text_config.eos_token_id", text.eos_token_id, EOT_ID)
    agree("vision_config.num_channels", image.num_channels, 3)
    check_vocabulary(Path(folder.tokenizer))
    projection, inner = ("batch_norm", ("vision_model.", "text_model.")) if groups else ("linear", ("", ""))
    size = square("vision_config.image_size", image.image_size)
    length, model = text.max_position_embeddings, plain(text)
    ours = CLIPConfig(
        embed_dim=dim,
        image=HuggingFaceImageConfig(plain(image), size, projection),
        text=HuggingFaceTextConfig(folder.tokenizer, False, length, "end", projection, model=model),
        preprocessing=preprocessing_of(folder.preprocessor or {}, size, "CLIPImageProcessor"),
    )
    pairs = [
        *same_pairs(state, f"visual.encoder.{inner[0]}", "vision_model."),
        *same_pairs(state, "visual.proj.", "visual_projection."),
        *same_pairs(state, f"text.transformer.{inner[1]}", "text_model."),
        *same_pairs(state, "text.proj.", "text_projection."),
        (["logit_scale"], ["logit_scale"], "same"),
    ]
    return ours, renamed(state, pairs, inwards=True)


def _align(folder: Folder) -> Converted:
    theirs = complete("AlignConfig", folder.values)
    image, text = theirs.vision_config, theirs.text_config
    agree("vision_config.num_channels", image.num_channels, 3)
    # The file has TensorFlow's momentum, the share of the old mean that stays.
    model = plain(image) | {"batch_norm_momentum": 1 - image.batch_norm_momentum}
    preprocessing = _align_pixels(folder.preprocessor or {})
    length = min(ALIGN_CONTEXT, text.max_position_embeddings)
    ours = CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=HuggingFaceImageConfig(model, preprocessing.image_size, "none"),
        text=bert(text, "bert", folder.tokenizer, context_length=length, projection_bias=True),
        preprocessing=preprocessing,
    )
    state = {name: tensor for name, tensor in folder.state.items() if not name.startswith("text_model.pooler.")}
    temperature = state.pop("temperature")
    pairs = [
        *same_pairs(state, "visual.encoder.", "vision_model."),
        *same_pairs(state, "text.transformer.", "text_model."),
        *same_pairs(state, "text.proj.", "text_projection."),
    ]
    return ours, {**renamed(state, pairs, inwards=True), "logit_scale": -temperature.float().log()}


def _align_pixels(theirs: Mapping[str, Any]) -> Preprocessing:
    for name, usual in ALIGN_SCALE.items():
        agree(f"preprocessor {name}", theirs.get(name), usual)
    scale = {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return preprocessing_of({**theirs, **scale}, None, "SiglipImageProcessor")
