"""Encoders of other libraries: timm's image models, transformers' text encoders and a few image encoders.

Either library is imported when one of its encoders is created: both take seconds.
Shapes: B batch, L tokens, W width, D embedding dimension.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lit_clip.errors import InputError, require
from lit_clip.models.config import HuggingFaceImageConfig, HuggingFaceTextConfig, TimmConfig, height_width
from lit_clip.models.external_config import IMAGE_CLASSES, TEXT_CLASSES
from lit_clip.models.external_settings import check_text_only, timm_hub_weights, timm_name, timm_pretrained_cfg
from lit_clip.models.layers import EMBEDDINGS, HEAD
from lit_clip.models.packing import length_groups
from lit_clip.models.running import PartialForward, starting_at
from lit_clip.models.tokenizer import unpadded_lengths
from lit_clip.models.transformer import ImageEncoder, is_traced
from lit_clip.tools.hardware import to_device
from lit_clip.tools.hub_client import guard_hub, hub_errors, without_bar
from lit_clip.tools.reading import reason
from lit_clip.tools.untrusted import COUNTS
from lit_clip.tools.weight_files import read_tensors

GROUPVIT_RATIO = 16  # hidden width of its projection, as a multiple of the embedding's
JOINED = "token+mean"  # a pool of ours: the class token and the mean of the patches, joined (dino.txt)


def projection(
    width: int, embed_dim: int, kind: Literal["linear", "mlp", "none", "norm", "batch_norm"], bias: bool, name: str
) -> nn.Module:
    """Create the projection from a tower's features to the embedding."""
    if kind == "batch_norm":
        wide = GROUPVIT_RATIO * embed_dim
        return nn.Sequential(nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, embed_dim))
    if kind == "norm":
        layers = nn.Linear(width, embed_dim), nn.Linear(embed_dim, embed_dim, bias=bias)
        return nn.Sequential(nn.LayerNorm(width), *layers)
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=bias)
    if kind == "mlp":
        hidden = (width + embed_dim) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, embed_dim, bias=bias))
    if width != embed_dim:
        raise InputError(f"architecture: {name} has {width} features but embed_dim is {embed_dim}; set a projection")
    return nn.Identity()


class TimmImageEncoder(ImageEncoder):
    """A timm model without its classifier (``trunk``) and a projection (``head``), named as in open_clip."""

    def __init__(self, config: TimmConfig, embed_dim: int, bands: int = 3) -> None:
        from lit_clip.models import naflex  # imports timm

        super().__init__()
        assert config.image_size is not None  # with_external_settings has filled it in
        self.image_size, self.bands = config.image_size, bands
        self.trunk = _trunk(config, bands, classes=embed_dim if config.projection == "classifier" else 0)
        self.reads_patches = naflex.is_naflex(self.trunk)
        if self.reads_patches:
            naflex.prepare(self.trunk)
        self.head = nn.Sequential()
        trunk: Any = self.trunk
        features = int(trunk.head_hidden_size or trunk.num_features)
        self.joined = config.pool == JOINED
        if self.joined:
            known = getattr(trunk, "cls_token", None) is not None and config.projection != "classifier"
            needs = f"pool {JOINED} needs a class token, which {config.timm} may lack, and no classifier"
            require(known, f"architecture.image: {needs}")
            features *= 2
        if config.projection == "linear":
            self.head.proj = projection(features, embed_dim, "linear", config.projection_bias, config.timm)
        elif config.projection == "mlp":
            from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]  # timm's documented home

            self.head.mlp = Mlp(features, 2 * embed_dim, embed_dim, bias=(True, config.projection_bias))
        elif config.projection == "none":
            projection(features, embed_dim, "none", False, config.timm)  # checks that the widths agree

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` (or patch sequences) float, normalised -> ``[B, W]``, before the projection."""
        if self.reads_patches and images.ndim == 3:
            from lit_clip.models import naflex

            return naflex.features(self.trunk, images)
        self.check(images)
        return self.pooled(cast(Any, self.trunk).forward_features(images)) if self.joined else self.trunk(images)

    def pooled(self, x: Tensor) -> Tensor:
        """Tokens or a feature map, after the trunk's last block and norm -> ``[B, W]``."""
        trunk: Any = self.trunk
        if not self.joined:
            return trunk.forward_head(x)
        patches = x[:, trunk.num_prefix_tokens :]
        return trunk.fc_norm(torch.stack([x[:, 0], patches.mean(dim=1)], dim=1)).flatten(1)

    def project(self, features: Tensor) -> Tensor:
        return self.head(features)

    def layer_names(self, prefix: str) -> dict[str, str]:
        """Map the names of the trunk's parameters to layers, see :func:`lit_clip.models.layers.layer_groups`."""
        from timm.models import group_parameters  # takes seconds

        trunk: Any = self.trunk
        matcher = trunk.group_matcher(coarse=False)
        layers: list[list[str]] = list(group_parameters(trunk, matcher).values())
        blocks = matcher["blocks"] if isinstance(matcher["blocks"], list | tuple) else [matcher["blocks"]]
        patterns = [each if isinstance(each, str) else each[0] for each in blocks]
        result = {f"{prefix}trunk.{name}": EMBEDDINGS for name in layers[0]}
        for i, names in enumerate(layers[1:]):
            # Parameters unknown to the matcher come last: attention pooling, a final norm or convolution.
            numbered = [name for name in names if re.search(r"\.\d+\.", name)]
            head = i == len(layers) - 2 and not any(re.match(each, name) for name in numbered for each in patterns)
            result |= {f"{prefix}trunk.{name}": HEAD if head else f"blocks.{i}" for name in names}
        return result


def _trunk(config: TimmConfig, bands: int, classes: int) -> nn.Module:
    import timm

    assert config.image_size is not None
    cfg, size, name = timm_pretrained_cfg(config), height_width(config.image_size), timm_name(config)
    from_hub = {} if config.model is None else {**config.model["model_args"], "pretrained_cfg": cfg}
    options = dict(config.options)
    if bands != 3:
        options["in_chans"] = bands
    # As in open_clip: a model whose pooling is changed afterwards keeps its norm, and so the names of its published
    # weights. Attention pooling cannot be added then, and the classifier of some models depends on the pooling.
    pool = "token" if config.pool == JOINED else config.pool
    pooled_later = pool is not None and pool != "map" and config.projection in ("linear", "mlp")
    if pool is not None and not pooled_later:
        options["global_pool"] = pool
    if cfg.fixed_input_size:  # a vision transformer: the position embedding depends on the size
        options["img_size"] = size
    guard_hub()
    try:
        timms = config.pretrained is True and config.model is None
        trunk = timm.create_model(name, timms, num_classes=classes, **{**from_hub, **options})
        if pooled_later:
            cast(Any, trunk).reset_classifier(0, global_pool=pool)
        # Some models accept any size when created, but fail on images of another size; those on the meta device are
        # to be filled with the weights of a model that passed this.
        if size != tuple(cfg.input_size[1:]) and not next(trunk.parameters()).is_meta:
            with torch.no_grad():
                trunk.eval()(torch.zeros(1, bands, *size))
            trunk.train()
    except Exception as error:  # hundreds of models raise anything: TypeError, AssertionError, OSError, ...
        settings = ", ".join(f"{key} {value}" for key, value in {"image_size": config.image_size, **options}.items())
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"architecture.image: timm cannot create {config.timm} with {settings}: {words}") from error
    if config.pretrained is True and config.model is not None:
        load_timm_file(trunk, config.timm, str(timm_hub_weights(config.timm)), bands)
    if isinstance(config.pretrained, str):
        load_timm_file(trunk, config.timm, config.pretrained, bands)
    return trunk


def load_timm_file(trunk: nn.Module, name: str, path: str, bands: int = 3) -> None:
    """Copy weights from a timm file, or from another library's file for the same model, into a trunk.

    Weights of another image size are resized, and weights of red, green and blue adapted to other ``bands``, by timm's
    own rules. Different names are matched by order, if every tensor's shape and the last part of its name agree. The
    file's classifier is ignored; a trunk that has a classifier keeps its own.
    """
    theirs, state, refusal = read_tensors(Path(path)), trunk.state_dict(), f"{path}: not weights of timm's {name}"
    classifiers = cast(Any, trunk).pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{part}." for part in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    ours = {key: value for key, value in state.items() if not key.startswith(classifiers)}
    if ours.keys() <= theirs.keys():
        theirs = {key: value for key, value in theirs.items() if not key.startswith(classifiers)}
        parts = {key.partition(".")[0] for key in ours}
        more = [key for key in theirs if key not in ours and key.partition(".")[0] in parts]
        require(not more, f"{refusal}: {''.join(more[:1])} is absent here")
        theirs = resized_trunk(theirs, trunk, "")
    else:  # another library's names; it may end with a classifier's weight and bias
        pairs = list(zip(ours, theirs, strict=False))
        endings = all(a.rpartition(".")[2] == b.rpartition(".")[2] for a, b in pairs)
        if not endings or not len(ours) <= len(theirs) <= len(ours) + 2:
            raise InputError(f"{refusal}: {min(ours.keys() - theirs.keys())} is absent there")
        theirs = {a: theirs[b] for a, b in pairs}
    theirs = _in_bands(theirs, trunk, bands)
    for key, value in ours.items():
        there, here = tuple(theirs[key].shape), tuple(value.shape)
        require(there == here, f"{refusal}: {key} is {there} there and {here} here")
    trunk.load_state_dict({**state, **{key: theirs[key] for key in ours}})


def _in_bands(state: Mapping[str, Tensor], trunk: nn.Module, bands: int) -> dict[str, Tensor]:
    """Return weights with first layers of red, green and blue adapted to the trunk's bands."""
    from timm.models import adapt_input_conv

    adapted, convs = dict(state), cast(Any, trunk).pretrained_cfg.get("first_conv") or ()
    for name in (convs,) if isinstance(convs, str) else convs:
        conv, weight = cast(Any, trunk.get_submodule(name)), state.get(f"{name}.weight")
        if bands == 3 or weight is None or weight.ndim != 4 or weight.shape == conv.weight.shape:
            continue
        # A stem may see several pixels of a band as channels, or divide the channels into groups.
        if weight.shape[1] * bands * conv.groups == 3 * conv.in_channels:
            adapted[f"{name}.weight"] = adapt_input_conv(bands, weight)
    return adapted


def _part(model: Mapping[str, Any], classes: Mapping[str, str], where: str, **settings: Any) -> nn.Module:
    import transformers

    values = {**model, **settings}
    kind = values.pop("model_type", None)
    require(kind in classes, f"{where}.model: model_type {kind!r} must be one of {', '.join(classes)}")
    with _creating(f"{where}: transformers cannot create {kind}"):
        config: Any = transformers.AutoConfig.for_model(kind, **values)
        repeats = getattr(config, "depth_coefficient", 0) * sum(getattr(config, "num_block_repeats", ()))
        blocks = max(config.num_hidden_layers, sum(getattr(config, "depths", ())), repeats)
        require(blocks <= COUNTS["layer"], f"{blocks} blocks must be at most {COUNTS['layer']}")
        return getattr(transformers, classes[kind])(config)


class HuggingFaceImageEncoder(ImageEncoder):
    """A part of a transformers model that encodes images (``encoder``), and a projection (``proj``)."""

    def __init__(self, config: HuggingFaceImageConfig, embed_dim: int) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.encoder = _part(config.model, IMAGE_CLASSES, "architecture.image", image_size=config.image_size)
        width = int(getattr(cast(Any, self.encoder).config, "hidden_size", embed_dim))  # an EfficientNet has none
        self.proj = projection(width, embed_dim, config.projection, False, type(self.encoder).__name__)

    def features(self, images: Tensor) -> Tensor:
        self.check(images)
        return self.encoder(pixel_values=images).pooler_output

    def project(self, features: Tensor) -> Tensor:
        return self.proj(features)


def _encoder(config: HuggingFaceTextConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    assert config.model is not None  # with_external_settings has filled it in
    if config.pooling == "end":  # eager, as AIMv2's own mask is not causal for texts without padding otherwise
        require(not config.pretrained, "architecture.text: pooling end starts from no weights; set pretrained to false")
        return _part(config.model, TEXT_CLASSES, "architecture.text", attn_implementation="eager")
    values = dict(config.model)
    where = f"architecture.text: transformers cannot create {config.hugging_face}"
    with _creating(where):
        hf_config: Any = AutoConfig.for_model(values.pop("model_type"), **values)
    check_text_only(hf_config, config.hugging_face)
    kinds = AutoModelForTextEncoding._model_mapping  # pyright: ignore[reportAttributeAccessIssue]  # no public lookup
    auto: Any = AutoModelForTextEncoding if type(hf_config) in kinds else AutoModel
    two_halves = hf_config.is_encoder_decoder
    if config.pretrained:
        model = _pretrained(auto, config, hf_config)
    else:
        with _creating(where):
            model = auto.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
    return model.get_encoder() if two_halves else model


@contextmanager
def _creating(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TypeError, KeyError, validation errors of their own, ...
        raise InputError(f"{where}: {reason(error)}") from error


def _pretrained(auto: Any, config: HuggingFaceTextConfig, hf_config: Any) -> Any:
    """Load a model with all its weights from the source; none may be left random."""
    where = f"architecture.text: {config.hugging_face}"
    # In float32, however they are stored.
    options = {"config": hf_config, "dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    bar = without_bar() if Path(config.hugging_face).is_dir() else nullcontext()  # a download shows its bar
    with hub_errors(f"{where}: no weights of that model there"), bar:
        model, loaded = auto.from_pretrained(config.hugging_face, **options)
    absent = sorted(key for key in loaded["missing_keys"] if config.pooling == "pooler" or "pooler" not in key)
    require(not absent, f"{where}: its weights lack {''.join(absent[:1])}, which would be random")
    return model


def _positions(model: Any) -> int | None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None or longest < 0:  # T5 has no such entry, XLNet has -1
        return None
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa and its relatives start counting after the padding's id.
    return longest if padding is None else longest - padding - 1


class HuggingFaceTextEncoder(nn.Module):
    """A transformers text encoder (``transformer``), pooling without padding, and a projection (``proj``)."""

    def __init__(self, config: HuggingFaceTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.transformer = model = cast(Any, _encoder(config))
        where = f"architecture.text: {config.hugging_face}"
        pad_id, width = getattr(model.config, "pad_token_id", None), getattr(model.config, "hidden_size", None)
        pad_id = 0 if config.pooling == "end" else pad_id  # CLIP's tokens
        if type(pad_id) is not int or type(width) is not int:
            raise InputError(f"{where} has no padding token, or no width")
        self.pooling, self.pad_id = config.pooling, pad_id
        self.in_groups = True  # texts of similar length; not with FSDP: all ranks must call the blocks equally often
        self.context_length = config.context_length
        longest, length = _positions(model), config.context_length
        if longest is not None and length > longest:
            raise InputError(
                f"architecture.text: context_length {length} exceeds the {longest} positions of {config.hugging_face}"
            )
        pooled = getattr(model, "pooler", None) is not None
        require(config.pooling != "pooler" or pooled, f"{where} has no pooler; choose another pooling")
        if config.pooling != "pooler" and pooled:
            model.pooler = None  # it would get no gradient
        self.proj = projection(width, embed_dim, config.projection, config.projection_bias, config.hugging_face)

    def forward(
        self, tokens: Tensor, lengths: Sequence[int] | None = None, entering: PartialForward | None = None
    ) -> Tensor:
        """int64 ``[B, L]`` -> ``[B, D]``; padding never changes the features.

        Texts of similar length are encoded together if that saves padding and the lengths are known without
        synchronising the device. With ``entering`` the blocks before are not computed.
        """
        return self.proj(self._pooled(tokens, lengths, entering))

    def _pooled(self, tokens: Tensor, lengths: Sequence[int] | None, entering: PartialForward | None) -> Tensor:
        if entering:
            tokens = tokens[:, : entering.x.shape[1]]
        unknown = not lengths and tokens.device.type != "cpu"
        if is_traced() or not len(tokens) or not self.in_groups or unknown:
            return self._encode(tokens, entering)
        lengths = lengths or unpadded_lengths(tokens, self.pad_id).clamp(min=1).tolist()
        groups = length_groups(lengths)
        if len(groups) == 1:
            return self._encode(tokens[:, : max(lengths)], entering)
        features = []
        for group in groups:
            longest, rows = max(lengths[row] for row in group.tolist()), to_device(group, tokens.device)
            part = entering and entering._replace(x=entering.x.index_select(0, rows))
            features.append(self._encode(tokens[:, :longest].index_select(0, rows), part))
        return torch.cat(features).index_select(0, to_device(torch.cat(groups).argsort(), tokens.device))

    def _encode(self, tokens: Tensor, entering: PartialForward | None = None) -> Tensor:
        # A causal encoder reads no padding. Some tokenizers turn an empty text into padding only.
        mask = torch.ones_like(tokens) if self.pooling == "end" else (tokens != self.pad_id).long()  # [B, L]
        mask[:, 0] = 1
        L = tokens.shape[1]
        with starting_at(entering.module, entering.x[:, :L], entering.skipped) if entering else nullcontext():
            out = self.transformer(input_ids=tokens, attention_mask=mask)
        if self.pooling in ("pooler", "end"):
            return out.pooler_output
        x = out.last_hidden_state  # [B, L, W]
        if self.pooling == "mean":
            weights = mask[:, :, None].to(x.dtype)
            return (x * weights).sum(dim=1) / weights.sum(dim=1)
        positions = torch.arange(L, device=tokens.device)
        index = (positions * mask).argmax(dim=1) if self.pooling == "last" else torch.zeros_like(mask[:, 0])
        return x[torch.arange(x.shape[0], device=x.device), index]


def resized_trunk(state: Mapping[str, Tensor], trunk: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Resize a timm trunk's weights to its image size, by timm's own rule for that model."""
    filter_weights = getattr(__import__(type(trunk).__module__, fromlist=["_"]), "checkpoint_filter_fn", None)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    filtered = filter_weights(inside, trunk) if filter_weights else inside
    return {**state, **{prefix + key: value for key, value in filtered.items()}}
