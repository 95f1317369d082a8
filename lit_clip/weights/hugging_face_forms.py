"""Models of transformers with CLIP's image encoder or transformers' own classes, one function for each form."""

import warnings
from pathlib import Path

from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceImageConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
)
from lit_clip.models.external import GROUPVIT_RATIO
from lit_clip.models.tokenizer import EOT_ID
from lit_clip.weights.hugging_face_encoders import (
    Converted,
    Folder,
    bert,
    clip_config,
    complete,
    plain,
    text_transformer,
)
from lit_clip.weights.hugging_face_keys import clip_pairs, renamed, same_pairs, vision_pairs
from lit_clip.weights.hugging_face_processor import agree, check_vocabulary, preprocessing_of, square

# Tokens of a text in the owner's training, of the 512 positions of BERT and XLM-R.
CHINESE_CLIP_CONTEXT, ALTCLIP_CONTEXT, ALIGN_CONTEXT = 52, 77, 64
# Pixels from -1 to 1, by EfficientNet's processor.
ALIGN_SCALE = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False}

FG_CLIP = "text_model.embeddings.position_embedding_res.weight"  # the weight that a CLIPModel has not
_FG_CLIP_LEFT_OUT = (
    *("text_model.embeddings.position_embedding_ori.", "text_model.embeddings.position_embedding_res."),
    *("text_filip_projection.", "logit_scale_finegraind", "logit_scale_hardneg"),  # sic; of FG-CLIP
    *("longtext_head.", "boxtext_head.", "dense_feature_head."),  # of FG-CLIP 2
)


def fg_clip_of_short_texts(folder: Folder) -> Folder:
    """Return the part of FG-CLIP (2) for whole images and short texts, a ``CLIPModel`` or ``Siglip2Model``."""
    left_out = [part for part in _FG_CLIP_LEFT_OUT if any(name.startswith(part) for name in folder.state)]
    parts = ", ".join(part.strip(".") for part in left_out)
    warnings.warn(f"{folder.tokenizer}: left out, as they read long texts and regions: {parts}", stacklevel=2)
    state = {name: tensor for name, tensor in folder.state.items() if not name.startswith(_FG_CLIP_LEFT_OUT)}
    if folder.values["model_type"] != "clip":
        return folder._replace(values={**folder.values, "model_type": "siglip2"}, state=state)
    # Its owner's examples squash an image before the processor.
    preprocessor = {**(folder.preprocessor or {}), "do_center_crop": False}
    side = preprocessor.get("crop_size", 224)
    size = side if isinstance(side, dict) else {"height": side, "width": side}
    return folder._replace(state=state, preprocessor={**preprocessor, "size": size})


def metaclip_2(folder: Folder) -> Converted:
    """Convert a ``MetaClip2Model``: a CLIPModel with a multilingual tokenizer, pooled at the end of text."""
    theirs = complete("MetaClip2Config", folder.values)
    text, source = theirs.text_config, HuggingFaceTokenizerConfig(folder.tokenizer)
    encoder = text_transformer(text, pool="eos", eos_id=text.eos_token_id, tokenizer=source)
    pairs = clip_pairs(theirs.vision_config.num_hidden_layers, text.num_hidden_layers)
    return clip_config(theirs, folder.preprocessor, encoder), renamed(folder.state, pairs, inwards=True)


def chinese_clip(folder: Folder) -> Converted:
    """Convert a ``ChineseCLIPModel``: its texts are read by the first token of a BERT."""
    theirs = complete("ChineseCLIPConfig", folder.values)
    length = min(CHINESE_CLIP_CONTEXT, theirs.text_config.max_position_embeddings)
    text = bert(theirs.text_config, "bert", folder.tokenizer, context_length=length)
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(folder.state, "text.transformer.", "text_model."),
        *same_pairs(folder.state, "text.proj.", "text_projection."),
    ]
    return clip_config(theirs, folder.preprocessor, text), renamed(folder.state, pairs, inwards=True)


def altclip(folder: Folder) -> Converted:
    """Convert an ``AltCLIPModel``: behind the first token of an XLM-R come a norm and two layers."""
    theirs = complete("AltCLIPConfig", folder.values)
    text = theirs.text_config
    agree("text_config.project_dim", text.project_dim, theirs.projection_dim)
    agree("text_config.layer_norm_eps", text.layer_norm_eps, 1e-5)
    # Releases of transformers disagree whether blocks are `layer` or `layers`.
    state = {
        name.replace(".layers.", ".layer.")
        if name.startswith("text_model.")
        else name.replace(".layer.", ".layers."): tensor
        for name, tensor in folder.state.items()
    }
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(state, "text.transformer.", "text_model.roberta."),
        *same_pairs(state, "text.proj.0.", "text_model.pre_LN."),
        *same_pairs(state, "text.proj.1.", "text_model.transformation."),
        *same_pairs(state, "text.proj.2.", "text_projection."),
    ]
    length = min(ALTCLIP_CONTEXT, text.max_position_embeddings - text.pad_token_id - 1)
    encoder = bert(text, "xlm-roberta", folder.tokenizer, context_length=length, projection="norm")
    return clip_config(theirs, folder.preprocessor, encoder), renamed(state, pairs, inwards=True)


def aimv2_or_groupvit(folder: Folder) -> Converted:
    """Convert an ``Aimv2Model`` or a ``GroupViTModel``: transformers' own encoders, which read CLIP's tokens."""
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


def align(folder: Folder) -> Converted:
    """Convert an ``AlignModel``: transformers' own EfficientNet, and the first token of a BERT."""
    theirs = complete("AlignConfig", folder.values)
    image, text = theirs.vision_config, theirs.text_config
    agree("vision_config.num_channels", image.num_channels, 3)
    # The file has TensorFlow's momentum, the share of the old mean that stays.
    model = plain(image) | {"batch_norm_momentum": 1 - image.batch_norm_momentum}
    pixels = dict(folder.preprocessor or {})
    for name, usual in ALIGN_SCALE.items():
        agree(f"preprocessor {name}", pixels.get(name), usual)
    pixels |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    preprocessing = preprocessing_of(pixels, None, "SiglipImageProcessor")
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
