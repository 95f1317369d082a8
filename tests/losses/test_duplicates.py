"""Numbers that pairs share if, and only if, they say the same."""

import subprocess
import sys

import pytest
import torch

from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses.duplicates import pair_ids, token_hash
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.tools.hashing import stable_hash

TEXTS = ["a cat", "a dog", "a cat!", "!a cat", "a cat", "", "!", "!!", "! !", "cat a", "the cat sat on the mat " * 9]


def test_texts_share_a_number_exactly_if_their_tokens_are_equal() -> None:
    tokens = CLIPTokenizer(77)(TEXTS)
    equal = (tokens[:, None] == tokens[None]).all(dim=-1)
    numbers = token_hash(tokens, 0)
    assert torch.equal(numbers[:, None] == numbers[None], equal)
    assert int(equal.sum()) == len(TEXTS) + 2  # "a cat" twice


@pytest.mark.parametrize("pad_id", [0, 1])
def test_padding_does_not_count(pad_id: int) -> None:
    tokens = torch.tensor([[7, 8, 9], [7, 9, 8]])
    padded = torch.nn.functional.pad(tokens, (0, 5), value=pad_id)
    assert torch.equal(token_hash(tokens, pad_id), token_hash(padded, pad_id))
    assert token_hash(tokens, pad_id).unique().numel() == 2


def test_a_million_texts_have_as_many_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49408, (1_000_000, 8), generator=generator).unique(dim=0)
    assert token_hash(tokens, 0).unique().numel() == len(tokens)


def test_numbers_of_keys_are_the_same_in_every_process() -> None:
    program = "from lit_clip.losses.duplicates import stable_hash; print(stable_hash('photos/1.jpg'))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(other.stdout) == stable_hash("photos/1.jpg")


def test_images_captions_and_groups_each_join_pairs_and_a_missing_group_joins_none() -> None:
    tokens = CLIPTokenizer(16)(["a cat", "a dog", "a cat", "a bird", "a cow", "a fish"])
    ids = pair_ids(["1", "2", "3", "1", "5", "6"], tokens, 0, ["", "pet", "", "", "pet", ""])
    same = (ids[:, None] == ids[None]).any(dim=-1)
    expected = torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 2), (0, 3), (1, 4)):  # caption, image, group
        expected[i, j] = expected[j, i] = True
    assert torch.equal(same, expected)
    assert torch.equal(pair_ids(["1"], tokens[:1], 0), pair_ids(["1"], tokens[:1], 0, [""]))


def test_groups_for_some_of_the_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="1 groups for 2 pairs"):
        pair_ids(["1", "2"], CLIPTokenizer(16)(["a", "b"]), 0, ["x"])


@pytest.mark.parametrize(("parts", "sizes"), [(1, [7]), (3, [2, 2, 3]), (7, [1] * 7), (9, [1] * 7)])
def test_a_batch_is_split_in_order_into_parts_that_are_not_empty(parts: int, sizes: list[int]) -> None:
    rows = torch.arange(7)
    batch = CaptionBatch(
        rows[:, None, None, None], rows[:, None], [str(i) for i in range(7)], [f"{i}" for i in range(7)]
    )
    split = batch.split(parts)
    assert [len(part.keys) for part in split] == sizes
    assert torch.equal(torch.cat([part.tokens for part in split]), batch.tokens)
    assert [key for part in split for key in part.keys] == batch.keys
    assert all(part.groups == () for part in split)
