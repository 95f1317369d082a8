"""Encode the same captions with open_clip's text tower and ours (same weights), alternating; print the ratio.

    python benchmarks/text_encoding.py [--pairs 5]

The captions are OpenMoji's names in the sentence "a drawing of a {name}.": 5 to 20 tokens of the 77 that open_clip
encodes for each.
"""

import torch
from peers import captions, compare, open_clip_pair, parser

from lit_clip.tokenizer import trim_padding


def main() -> None:
    options = parser(__doc__).parse_args()
    theirs, ours = open_clip_pair("ViT-B-32")
    tokens = ours.tokenize(captions(64))

    @torch.inference_mode()
    def encode_theirs() -> torch.Tensor:
        return theirs.encode_text(tokens)

    @torch.inference_mode()
    def encode_ours() -> torch.Tensor:
        return ours.encode_text(trim_padding(tokens))

    difference = (encode_theirs() - encode_ours()).abs().max().item()
    print(f"largest difference of a feature: {difference:.1e}")
    compare("text encoding, 64 captions, ViT-B-32, fp32", encode_theirs, encode_ours, options.pairs)


if __name__ == "__main__":
    main()
