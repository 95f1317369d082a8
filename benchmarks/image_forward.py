"""Time the image encoder alone, open_clip's and ours with the same weights, in inference mode, alternating.

    python benchmarks/image_forward.py [--model ViT-B-32] [--batch 64] [--precisions fp32 bf16] [--pairs 5]

Images have no padding to save, so the figure to watch is the share of the machine's peak: see ``train_step.py``.
"""

import torch
from peers import autocast, compare, end_if_emulated, open_clip_pair, parser, save
from results import Result

from lit_clip.models.config import height_width

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measured(model: str, batch: int, precision: str, pairs: int, device: str) -> Result:
    theirs, ours = (model.to(device).eval() for model in open_clip_pair(model))
    size = height_width(ours.preprocessing.image_size)
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)

    def encode(encoder: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode(), autocast(device, precision == "bf16"):
            return encoder(images)

    title = f"image encoder, {model}, {batch} images, {precision}" + ("" if device == "cpu" else f", {device}")
    result = compare(
        title,
        lambda: encode(theirs.visual),
        lambda: encode(ours.visual),
        pairs,
        name=f"image_forward/{model}/{precision}" + ("" if device == "cpu" else f"/{device}"),
        dtype=DTYPES[precision],
        device=device,
    )
    result.figures["largest_difference"] = (encode(theirs.visual) - encode(ours.visual)).abs().max().item()
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="ViT-B-32")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = arguments.parse_args()
    found = []
    for precision in options.precisions:  # float32 first: the program ends where bfloat16 is emulated
        end_if_emulated(precision == "bf16", options.device)
        found.append(measured(options.model, options.batch, precision, options.pairs, options.device))
        save(options.json, *found)


if __name__ == "__main__":
    main()
