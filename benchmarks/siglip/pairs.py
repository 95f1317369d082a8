"""The pairs of the bench as features of two frozen encoders: OpenMoji's drawings, and two tables of photographs.

Encoding takes most of the time, so the features are kept in a file.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from datamodules import Captions
from datamodules.openmoji import Emoji, EmojiPairs, draw, held_out, read_table
from datamodules.pairs.source import PairSource
from lit_clip import create_model
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.tools.atomic import replacing

Kind = Literal["drawings", "photographs"]
SIDE = 128  # pixels
OTHER_GROUPS = ("animals nature", "food drink", "activities")  # of drawings that pretraining does not see
VERSIONS = {"drawings": 3, "photographs": 2}  # of a training image: as it is, and augmented


@dataclass
class Pairs:
    """Images and their captions.

    Attributes:
        images: stored features ``[N, V, 1280]`` of V versions of each image; the first is the image as it is.
        captions: int64 ``[N, C]``, rows of :attr:`Data.texts`; the first is for evaluation.
    """

    images: Tensor
    captions: Tensor

    def at(self, rows: Sequence[int]) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(self.images[list(rows)], self.captions[list(rows)])


@dataclass
class Data:
    """What is learned first, and what is fine-tuned on; both with tests that no training sees.

    Attributes:
        texts: stored features ``[T, 384]`` of all captions.
        training: by name; "drawings" and "photographs" are learned first.
        tests: by name, those of ``training``.
    """

    texts: Tensor
    training: dict[str, Pairs]
    tests: dict[str, Pairs]


def encoders(image_weights: str, text_encoder: str) -> CLIP:
    """Return EfficientNet-Lite0 and MiniLM, without projections of the text."""
    model = create_model(
        CLIPConfig(
            384,
            TimmConfig("tf_efficientnet_lite0", pretrained=image_weights, image_size=SIDE),
            HuggingFaceTextConfig(text_encoder, context_length=48),
        )
    )
    model.text.proj = nn.Identity()
    return model.eval()


class Encoding:
    """Stores features of images and of texts.

    Args:
        model: the encoders.
    """

    def __init__(self, model: CLIP) -> None:
        self.model, self.rows = model, dict[str, int]()
        square = [v2.Resize(SIDE, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SIDE)]
        self.plain, self.pixels = v2.Compose(square), v2.PILToTensor()
        crop = v2.RandomResizedCrop(SIDE, scale=(0.7, 1.0), ratio=(0.9, 1.11), antialias=True)
        self.augmented = {
            "drawings": v2.Compose([crop, v2.ColorJitter(0.4, 0.4, 0.8, 0.2)]),
            "photographs": v2.Compose([*square, crop, v2.RandomHorizontalFlip()]),
        }

    def row(self, text: str) -> int:
        """Return the row of a text."""
        return self.rows.setdefault(text, len(self.rows))

    @torch.inference_mode()
    def texts(self) -> Tensor:
        """Return the features of all texts so far."""
        texts = list(self.rows)
        parts = [texts[start : start + 128] for start in range(0, len(texts), 128)]
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([self.model.encode_text(self.model.tokenize(part)).float() for part in parts])

    @torch.inference_mode()
    def images(self, source: PairSource, kind: Kind, versions: int) -> Tensor:
        """Return ``[N, versions, 1280]``."""
        torch.manual_seed(0)
        parts = []
        for start in range(0, len(source), 32):
            images = [source.load(row, None).image for row in range(start, min(start + 32, len(source)))]
            changes = [self.plain] + [self.augmented[kind]] * (versions - 1)
            pixels = torch.stack([self.pixels(change(image)) for image in images for change in changes])
            with torch.autocast("cpu", torch.bfloat16):
                features = self.model.image_features(self.model.normalize(pixels))[0].float()
            parts.append(features.unflatten(0, (len(images), versions)))
        return torch.cat(parts)

    def table(self, source: PairSource, versions: int) -> Pairs:
        """Return a table's pairs, each with the one caption that it has."""
        captions = [[self.row(source.captions(row)[0])] for row in range(len(source))]
        return Pairs(self.images(source, "photographs", versions), torch.tensor(captions))

    def drawings(self) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
        """Return OpenMoji's drawings to train on and to test: "drawings", and "other drawings" of other groups.

        A drawing's captions are its name and three times its name with some tags; those to be learned first have their
        groups too. Every tenth drawing (no flag) is for testing, and every third of the other groups.
        """
        emoji, rng = read_table(), random.Random(0)
        texts = [[e.name] * 4 + [with_tags(e, rng) for _ in range(3)] for e in emoji]
        names = torch.tensor([[self.row(text) for text in row] for row in texts])
        groups = torch.tensor([[self.row(e.group), self.row(f"{e.group}, {e.subgroup}")] for e in emoji])
        images = self.images(EmojiPairs(emoji, draw()), "drawings", VERSIONS["drawings"])
        out, other = held_out(emoji), [row for row, e in enumerate(emoji) if e.group in OTHER_GROUPS]
        known = [row for row in range(len(emoji)) if row not in set(other)]
        first = [row for row in known if not out[row]]
        training = {
            "drawings": Pairs(images[first], torch.cat([names, groups], dim=1)[first]),
            "other drawings": Pairs(images, names).at([row for place, row in enumerate(other) if place % 3]),
        }
        tests = {"drawings": [row for row in known if out[row]], "other drawings": other[::3]}
        return training, {name: Pairs(images[:, :1], names).at(rows) for name, rows in tests.items()}


def with_tags(emoji: Emoji, rng: random.Random) -> str:
    tags = [tag for tag in emoji.tags if tag != emoji.name]
    return ", ".join([emoji.name, *rng.sample(tags, min(len(tags), rng.randint(1, 3)))])


def load(file: Path, tables: dict[str, tuple[Path, Path]], weights: tuple[str, str]) -> Data:
    """Return the pairs, encoded once and kept in a file.

    Args:
        file: to read, or to write.
        tables: by name, tables of images and captions to train on and to test.
        weights: EfficientNet's file, and MiniLM's folder.
    """
    if not file.exists():
        encoding = Encoding(encoders(*weights))
        training, tests = encoding.drawings()
        for name, (train, test) in tables.items():
            first, second = Captions(str(train), str(test)).sources(fit=True)
            assert first is not None, "sources of a fit"
            training[name] = encoding.table(first, VERSIONS["photographs"])
            tests[name] = encoding.table(second, 1)
        texts = encoding.texts()
        plain = {
            kind: {name: (p.images, p.captions) for name, p in part.items()}
            for kind, part in (("training", training), ("tests", tests))
        }
        with replacing(file) as draft:
            torch.save({"texts": texts, **plain}, draft)
    kept = torch.load(file, weights_only=True)
    parts = ({name: Pairs(*both) for name, both in kept[kind].items()} for kind in ("training", "tests"))
    return Data(kept["texts"], *parts)
