"""FG-CLIP 1 and 2: a CLIPModel and a Siglip2Model, without their weights for long texts and regions."""

import warnings

from lit_clip.weights.hugging_face_encoders import Folder

MARK = "text_model.embeddings.position_embedding_res.weight"
_LEFT_OUT = (
    *("text_model.embeddings.position_embedding_ori.", "text_model.embeddings.position_embedding_res."),
    *("text_filip_projection.", "logit_scale_finegraind", "logit_scale_hardneg"),  # sic; of FG-CLIP
    *("longtext_head.", "boxtext_head.", "dense_feature_head."),  # of FG-CLIP 2
)


def short_texts(folder: Folder) -> Folder:
    """Return the part that reads whole images and short texts, as ``CLIPModel`` and ``Siglip2Model`` do."""
    parts = ", ".join(part.strip(".") for part in _LEFT_OUT if any(name.startswith(part) for name in folder.state))
    warnings.warn(f"{folder.tokenizer}: left out, as they read long texts and regions: {parts}", stacklevel=2)
    state = {name: tensor for name, tensor in folder.state.items() if not name.startswith(_LEFT_OUT)}
    if folder.values["model_type"] != "clip":
        return folder._replace(values={**folder.values, "model_type": "siglip2"}, state=state)
    # Its owner's examples squash an image before the processor.
    preprocessor = {**(folder.preprocessor or {}), "do_center_crop": False}
    side = preprocessor.get("crop_size", 224)
    size = side if isinstance(side, dict) else {"height": side, "width": side}
    return folder._replace(state=state, preprocessor={**preprocessor, "size": size})
