"""Captions, as the tokenizers get them, and names of files, as the model card shows them."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import process_time

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer
from lit_clip.models.tokenizer import EOT_ID, SOT_ID, CLIPTokenizer
from lit_clip.weights.export import Parity
from lit_clip.weights.publish import ExportedSource, model_card
from tests.fuzz.inputs import Input, Target, texts

SLOW = 3.0  # seconds of the processor for one caption
LENGTH = 16


@cache
def words_tokenizer() -> HuggingFaceTokenizer:
    """Return a tokenizer of a few words, as a text encoder of transformers has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return HuggingFaceTokenizer(tokenizer.to_str(), 0, "canonicalize", LENGTH, False)


def read_caption(folder: Path, given: Input) -> Iterator[str]:
    """Turn a caption into ids."""
    text = given.data.decode("utf-8", "surrogatepass")
    clip = CLIPTokenizer(LENGTH)
    start = process_time()
    ids = clip(text)
    assert ids.shape == (1, LENGTH)
    row = ids[0].tolist()
    length = int(clip.lengths(ids))
    assert row[0] == SOT_ID, row
    assert row[length - 1] == EOT_ID, row
    last = max(place for place, number in enumerate(row) if number == EOT_ID)  # a caption may spell it, too
    assert not any(row[last + 1 :]), row
    assert clip.count(text) >= length
    assert isinstance(clip.decode(row), str)
    other = words_tokenizer()(text)
    assert other.shape == (1, LENGTH)
    assert 0 <= int(other.min()) <= int(other.max()) < 4
    seconds = process_time() - start
    assert seconds < SLOW, f"{seconds:.1f} s for {len(text):,} characters"
    yield "used"


@cache
def tiny_model() -> CLIP:
    """Return the smallest CLIP."""
    image = VisionTransformerConfig(image_size=32, patch_size=16, width=8, layers=1, heads=1)
    return CLIP(CLIPConfig(8, image, TextTransformerConfig(context_length=8, width=8, layers=1, heads=1)))


def write_card(folder: Path, given: Input) -> Iterator[str]:
    """Write the model card of a checkpoint whose name is a text."""
    name = given.data.decode("utf-8", "surrogatepass")
    card = model_card(tiny_model(), "open_clip", "model", ExportedSource(name, None), Parity(0, 0, 0, True), None)
    card.encode()
    plain = model_card(tiny_model(), "open_clip", "model", ExportedSource("x", None), Parity(0, 0, 0, True), None)
    pairs = zip(card.splitlines(), plain.splitlines(), strict=True)
    changed = [line for line, other in pairs if line != other]
    assert all(line.startswith("| exported from | `") for line in changed), changed
    yield "used"


cards = Target(lambda: texts("name.txt"), write_card, named=False)
captions = Target(lambda: texts("caption.txt"), read_caption, named=False)
