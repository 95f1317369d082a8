"""Time building the paper's ImageNet classifier with open_clip's text tower and ours (same weights), alternating.

    python benchmarks/zero_shot_classifier.py [--classes 1000] [--pairs 3]

1,000 class names in 80 templates make 80,000 prompts of 10 tokens on average, while open_clip encodes 77 for each. Both
times include tokenising. With all classes open_clip takes many minutes on a CPU.
"""

import open_clip
import torch
from peers import compare, open_clip_pair, parser, save

from lit_clip import zero_shot_classifier
from lit_clip.evaluation.zero_shot import imagenet_class_names, imagenet_templates


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classes", type=int, default=1000, help="number of ImageNet's classes to use")
    options.set_defaults(pairs=3)
    chosen = options.parse_args()
    theirs, ours = open_clip_pair("ViT-B-32")
    theirs.eval()
    ours.eval()
    names, templates = imagenet_class_names()[: chosen.classes], imagenet_templates()
    tokenizer = open_clip.SimpleTokenizer()
    built: dict[str, torch.Tensor] = {}

    def build_theirs() -> None:
        built["theirs"] = open_clip.build_zero_shot_classifier(
            theirs, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
        )

    def build_ours() -> None:
        built["ours"] = zero_shot_classifier(ours, names, templates)

    title = f"classifier of {len(names)} x {len(templates)} prompts, ViT-B-32, fp32"
    result = compare(title, build_theirs, build_ours, chosen.pairs, name="zero_shot_classifier")
    difference = (built["theirs"] - built["ours"]).abs().max().item()
    print(f"largest difference of a weight: {difference:.1e}")
    result.figures["largest_difference"] = difference
    save(chosen.json, result)


if __name__ == "__main__":
    main()
