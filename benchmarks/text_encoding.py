"""Time text encoding of the same captions by open_clip's text tower and ours (same weights), alternating.

    python benchmarks/text_encoding.py [--pairs 5]

The captions are OpenMoji's names in a sentence, some with tags: 14 tokens on average, while open_clip encodes 77 for
each.
"""

import torch
from peers import captions, compare, length_figures, lengths_of, open_clip_pair, parser, save

from lit_clip.models.tokenizer import CLIPTokenizer


def main() -> None:
    options = parser(__doc__).parse_args()
    theirs, ours = open_clip_pair("ViT-B-32")
    tokens = ours.tokenize(captions(64))
    lengths = length_figures(lengths_of(ours, tokens))

    @torch.inference_mode()
    def encode_theirs() -> torch.Tensor:
        return theirs.encode_text(tokens)

    @torch.inference_mode()
    def encode_ours() -> torch.Tensor:
        return ours.encode_text(CLIPTokenizer().trim(tokens))

    difference = (encode_theirs() - encode_ours()).abs().max().item()
    print(f"largest difference of a feature: {difference:.1e}")
    title = "text encoding, 64 captions, ViT-B-32, fp32"
    result = compare(title, encode_theirs, encode_ours, options.pairs, name="text_encoding")
    result.figures.update(lengths | {"largest_difference": difference})
    save(options.json, result)


if __name__ == "__main__":
    main()
