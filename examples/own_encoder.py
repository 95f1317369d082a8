"""Train with an image encoder of your own beside CLIP's text encoder.

    python own_encoder.py captions.csv
    lit-clip --import own_encoder classify photos --model own_encoder.ckpt --classes tiger pizza

The table of what is trained shows the encoder's parameters. A checkpoint needs `--import` or `import own_encoder`.
"""

import sys

from lightning.pytorch import Trainer
from torch import nn

from lit_clip import CLIPConfig, LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.models.config import TextTransformerConfig
from lit_clip.models.external_config import CustomImageConfig


class MyImageEncoder(nn.Module):
    image_size = 64  # a side, or height and width

    def __init__(self, embed_dim, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in "12"))
        self.proj = nn.Linear(width, embed_dim)

    def forward(self, images):  # float [B, 3, H, W], normalised -> [B, embed_dim]
        return self.proj(self.blocks(self.stem(images)).mean(dim=(2, 3)))


if __name__ == "__main__":
    text = TextTransformerConfig(context_length=32, width=64, layers=2, heads=1)
    module = LitCLIP(CLIPConfig(64, CustomImageConfig(MyImageEncoder, {"width": 16}), text))
    trainer = Trainer(callbacks=callbacks.defaults(), max_epochs=2, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.fit(module, Captions(sys.argv[1], batch_size=32))
    trainer.save_checkpoint("own_encoder.ckpt")
