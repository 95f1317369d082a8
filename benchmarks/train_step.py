"""A training step of open_clip (its model, ClipLoss and AdamW groups) and of ours, same weights and batch, alternating.

    python benchmarks/train_step.py [--pairs 5] [--batch 32] [--bf16]

Text is what differs most: open_clip encodes 77 positions of every caption, we those that the batch needs.
"""

import open_clip
import torch
from peers import captions, compare, open_clip_pair, parser

from lit_clip.losses import contrastive_loss
from lit_clip.optim import decay_groups
from lit_clip.tokenizer import trim_padding


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--bf16", action="store_true")
    options = arguments.parse_args()
    theirs, ours = open_clip_pair("ViT-B-32")
    images, tokens = torch.randn(options.batch, 3, 224, 224), ours.tokenize(captions(options.batch))
    adam = {"lr": 1e-6, "betas": (0.9, 0.98), "eps": 1e-6}  # a tiny rate: the losses stay comparable
    their_optimizer = torch.optim.AdamW(decay_groups(theirs, 0.2), **adam)
    our_optimizer = torch.optim.AdamW(decay_groups(ours, 0.2), **adam, fused=True)
    their_loss = open_clip.ClipLoss()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)

    def step_theirs() -> float:
        with autocast():
            loss = their_loss(*theirs(images, tokens))
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        return loss.item()

    def step_ours() -> float:
        with autocast():
            image = ours.encode_image(images, normalize=True)
            text = ours.encode_text(trim_padding(tokens), normalize=True)
            loss = contrastive_loss(image, text, image, text, ours.logit_scale.exp())
        loss.backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
        return loss.item()

    print(f"losses of the first step: {step_theirs():.5f} (open_clip), {step_ours():.5f} (lit-clip)")
    precision = "bf16" if options.bf16 else "fp32"
    compare(f"training step, batch {options.batch}, ViT-B-32, {precision}", step_theirs, step_ours, options.pairs)


if __name__ == "__main__":
    main()
