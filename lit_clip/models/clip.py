"""CLIP: two encoders, one embedding space, one temperature.

The state dict has OpenAI's key names. Shapes: B batch, L tokens, W width, D embedding dimension.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.losses.contrastive import unit
from lit_clip.models import preprocess as pp
from lit_clip.models.config import CLIPConfig, TextTransformerConfig
from lit_clip.models.encoders import check_patches, create_tokenizer, image_encoder, input_dtype, text_encoder
from lit_clip.models.external_config import CustomTextConfig
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.layers import Tower
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.models.transformer import TextTransformer

if TYPE_CHECKING:
    from lit_clip.models.frozen_prefix import FrozenPrefix
    from lit_clip.models.heat_maps import Item

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # paper, section 2.5
MAX_LOGIT_SCALE = math.log(100)  # paper, section 2.5: "clipped to prevent scaling the logits by more than 100"
SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = math.log(10), -10.0  # Zhai et al. 2023, section 3.2


class CLIP(TextTransformer):
    """The image and text encoders of the paper, of SigLIP, of other libraries, or of your own.

    OpenAI's models have the text encoder's parts beside ``visual``, so a CLIP is itself a text transformer; any other
    text encoder is the module ``text``. :attr:`text_encoder` is the module that has the parts.

    Args:
        config: the architecture.
        tokenizer: None: the one that the architecture names, read from its source on first use.

    Attributes:
        config: the architecture, with the settings of other libraries filled in.
        preprocessing: how :meth:`preprocess` transforms an image.
        logit_scale: log of the inverse temperature, a scalar parameter.
        logit_bias: added to the logits by the sigmoid loss, a scalar parameter; None if the architecture has none.
        frozen_prefixes: of towers that train on stored activations, see :class:`callbacks.FrozenFeatures`.
    """

    def __init__(self, config: CLIPConfig, tokenizer: TextTokenizer | None = None) -> None:
        nn.Module.__init__(self)  # not TextTransformer's: its parts are added below if this architecture has them
        self.config = config = with_external_settings(config)
        assert config.preprocessing is not None  # with_external_settings has filled it in
        self.preprocessing = config.preprocessing
        self.visual = image_encoder(config)
        check_patches(self.visual, self.preprocessing)
        if config.papers_layout:
            assert isinstance(config.text, TextTransformerConfig)
            self.add_text(config.text, config.embed_dim, config.activation)
        else:
            self.text = text_encoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(SIGLIP_LOGIT_SCALE if config.logit_bias else INITIAL_LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_LOGIT_BIAS)) if config.logit_bias else None
        self._tokenizer = tokenizer
        self.frozen_prefixes: dict[Tower, FrozenPrefix] = {}

    @property
    def text_encoder(self) -> nn.Module:
        """The module with the text encoder's parts: the model itself, or ``text``."""
        return self if self.config.papers_layout else self.text

    @property
    def context_length(self) -> int:
        """Maximum tokens of a caption."""
        return self.config.text.context_length

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.logit_scale.device

    def preprocess(self, image: Image.Image | pp.Array) -> Tensor:
        """An image, or its bands ``[H, W, C]`` -> the encoder's float32 ``[C, H, W]`` (NaFlex: ``[1 + N, 3PP]``)."""
        image = pp.with_warning(image, self.preprocessing)
        return pp.image_transform(self.preprocessing)(image)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, picklable so that data workers can receive it."""
        if self._tokenizer is None:
            if isinstance(self.config.text, CustomTextConfig):
                return cast(TextTokenizer, self.text.tokenizer)
            self._tokenizer = create_tokenizer(self.config.text)
        return self._tokenizer

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 ``[N, context_length]``; longer ones are truncated."""
        return self.tokenizer(texts)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` -> float, the input of :meth:`encode_image`, in the precision that it needs."""
        dtype = input_dtype(self.visual, images.device, self.logit_scale.dtype)
        return pp.normalize(images, self.preprocessing, dtype)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Float, normalised ``[B, 3, H, W]`` -> ``[B, D]``, of unit length if ``normalize``."""
        features = self.visual(images)
        return unit(features) if normalize else features

    def encode_patches(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Float, normalised ``[B, 3, H, W]`` of any size -> features of each place ``[B, D, h, w]``.

        They are in the space of :meth:`encode_text`, of unit length over D if ``normalize``; see
        :func:`lit_clip.models.dense.encode_places`.
        """
        from lit_clip.models.dense import encode_places

        features = encode_places(self.visual, images)
        return unit(features.movedim(1, -1)).movedim(-1, 1) if normalize else features

    def forward_intermediates(self, image: Tensor | None = None, text: Tensor | None = None, **options: Any) -> Any:
        """Features and block outputs: :func:`lit_clip.models.intermediates.forward_intermediates`."""
        from lit_clip.models.intermediates import forward_intermediates

        return forward_intermediates(self, image, text, **options)

    def locate(self, image: "Item", texts: str | Sequence[str] | Tensor, scale: float = 1) -> Tensor:
        """Return the cosine of each text with each pixel of a whole image, float32 ``[N, H, W]``; see ``heat_maps``."""
        from lit_clip.models.heat_maps import heat_maps

        return heat_maps(self, image, texts, scale)

    def with_head(self, head: Any) -> nn.Module:
        """Return the model with a head: images -> class probabilities; see :class:`lit_clip.heads.Head`."""
        return head.on(self)

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float, normalised ``[B, 3, H, W]`` -> features before the projection and after it, ``[B, D]``.

        The paper's linear probes (appendix A.3) use those before the projection, ``[B, W]`` for a ViT. A ResNet
        projects inside its attention pooling and an encoder by class path wherever it likes, so both are the same.
        """
        features = self.visual.features(images)
        return features, self.visual.project(features)

    def encode_text(
        self, tokens: Tensor, normalize: bool = False, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """int64 ``[B, L]``, ``L`` at most the context length -> ``[B, D]``, of unit length if ``normalize``.

        Padding never changes the features. It costs nothing where the texts' lengths are known without synchronising
        the device: always on a CPU, elsewhere if ``lengths`` is given (``tokenizer.lengths``). Without them, drop the
        columns that no text needs (``tokenizer.trim``).
        """
        longest = tokens.shape[1]
        if longest > self.context_length:
            raise InputError(f"texts have {longest} tokens, the model reads {self.context_length}; use model.tokenize")
        lengths = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        if self.config.papers_layout:
            if self.config.text.tokenizer is not None:
                lengths = None  # the encoder stops at the highest id, which another tokenizer may use before the end
            features = self.read_text(tokens, lengths)
        else:
            features = self.text(tokens, lengths)
        return unit(features) if normalize else features

    def encode(self, items: "Item | Sequence[Item]", batch_size: int = 64) -> Tensor:
        """Texts, images and image files, in any mixture -> unit features on the CPU, in the order given.

        A PIL image is an image, and a ``pathlib.Path`` an image file. A string is an image file if it ends like one
        (``.jpg``, ``.png``, ...) and that file exists, and otherwise a text, which is truncated to the context.
        The model runs where it is, without gradients and in evaluation mode, and is left as it was. At most
        ``batch_size`` texts or images are encoded at once.

        Returns:
            float32 ``[N, D]``; of a single item ``[D]``.
        """
        from lit_clip.models.heat_maps import encode_items

        return encode_items(self, items, batch_size)

    def similarity(self, a: Any, b: Any, batch_size: int = 64) -> Tensor:
        """Return the cosine similarity of each of ``a`` with each of ``b``, float32 ``[len(a), len(b)]``.

        Either is what :meth:`encode` takes, or features ``[N, D]`` of any length (a tensor or an array); a single one
        counts as a list of one.
        """
        from lit_clip.models.heat_maps import as_features

        return as_features(self, a, batch_size) @ as_features(self, b, batch_size).T

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the logit scale to between 1 and 100; call this after every optimiser step.

        The sigmoid loss has no such bound: published SigLIP models have scales above 100.
        """
        if self.logit_bias is None and self.logit_scale.requires_grad:  # a frozen one stays
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
