"""CLIP: two encoders, one embedding space, one temperature.

The state dict has OpenAI's own key names. Shapes: B batch, L tokens, W width, D embedding dimension.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from lit_clip import preprocess as pp
from lit_clip.config import CLIPConfig
from lit_clip.errors import InputError, require
from lit_clip.losses import unit
from lit_clip.tokenizer import EOT_ID, Tokenize
from lit_clip.transformer import Transformer, VisionTransformer

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # paper, section 2.5
MAX_LOGIT_SCALE = math.log(100)  # paper, section 2.5: "clipped to prevent scaling the logits by more than 100"


class CLIP(nn.Module):
    """Image and text encoders of the paper.

    Attributes:
        config: the architecture.
        preprocessing: what :meth:`preprocess` does to a picture.
        logit_scale: log of the inverse temperature, a scalar parameter.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        assert config.preprocessing is not None  # __post_init__ has seen to it
        self.preprocessing = config.preprocessing
        self.visual = VisionTransformer(config.image, config.embed_dim, config.activation)
        self.transformer = Transformer(text.width, text.layers, text.heads, config.activation, causal=True)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        # The text encoder's initialisation in OpenAI's code.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)
        self.transformer.init_like_gpt()

    @property
    def context_length(self) -> int:
        """Most tokens a caption may have."""
        return self.config.text.context_length

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logit_scale.device

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture -> float32 ``[3, H, W]``, as :meth:`encode_image` wants it."""
        return pp.image_transform(self.preprocessing)(image)

    @property
    def tokenizer(self) -> Tokenize:
        """CLIP's tokenizer for this model's context length, as an object that data workers can be sent."""
        vocab_size = self.config.text.vocab_size
        require(
            vocab_size > EOT_ID,
            f"architecture.text: vocab_size {vocab_size} is too small for CLIP's {EOT_ID + 1} tokens",
        )
        return Tokenize(self.context_length)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 ``[N, context_length]``; longer ones are cut."""
        return self.tokenizer(texts)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` of a batch -> float in the weights' precision, as :meth:`encode_image` wants it."""
        return pp.normalize(images, self.preprocessing).to(self.visual.conv1.weight.dtype)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Float, normalised ``[B, 3, H, W]`` -> ``[B, D]``, of unit length if ``normalize``."""
        features = self.visual(images)
        return unit(features) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """int64 ``[B, L]``, ``L`` at most the context length -> ``[B, D]``, of unit length if ``normalize``.

        A text is read at its first end-of-text token. Columns behind that of the longest text change nothing: leave
        them out (``trim_padding``) and save the time.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise InputError(f"texts have {length} tokens, the model reads {self.context_length}; tokenize for it")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # [B, L, W]
        x = self.transformer(x)
        end = tokens.argmax(dim=-1)  # [B]: the end-of-text token has the highest id
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # [B, W]
        features = x @ self.text_projection  # [B, D]
        return unit(features) if normalize else features

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logits' scale between 1 and 100; call it after every optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
