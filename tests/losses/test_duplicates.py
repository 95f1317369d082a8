"""Ids that two pairs share if and only if they are duplicates."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import duplicates
from lit_clip.losses.duplicates import pair_ids, token_hash
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.tools.hashing import stable_hash

TEXTS = ["a cat", "a dog", "a cat!", "!a cat", "a cat", "", "!", "!!", "! !", "cat a", "the cat sat on the mat " * 9]


def test_texts_share_a_hash_only_if_their_tokens_are_equal() -> None:
    tokens = CLIPTokenizer(77)(TEXTS)
    equal = (tokens[:, None] == tokens[None]).all(dim=-1)
    hashes = token_hash(tokens, 0)
    assert torch.equal(hashes[:, None] == hashes[None], equal)
    assert int(equal.sum()) == len(TEXTS) + 2  # "a cat" twice


@pytest.mark.parametrize("pad_id", [0, 1])
def test_padding_does_not_change_the_hash(pad_id: int) -> None:
    tokens = torch.tensor([[7, 8, 9], [7, 9, 8]])
    padded = torch.nn.functional.pad(tokens, (0, 5), value=pad_id)
    assert torch.equal(token_hash(tokens, pad_id), token_hash(padded, pad_id))
    assert token_hash(tokens, pad_id).unique().numel() == 2


def test_a_million_texts_have_no_hash_collisions() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49408, (1_000_000, 8), generator=generator)
    assert token_hash(tokens, 0).unique().numel() == len(tokens)


def test_hashes_of_keys_are_the_same_in_every_process() -> None:
    program = "from lit_clip.tools.hashing import stable_hash; print(stable_hash('photos/1.jpg'))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(other.stdout) == stable_hash("photos/1.jpg")


def test_pairs_with_the_same_image_caption_or_group_share_an_id_and_missing_groups_do_not() -> None:
    tokens = CLIPTokenizer(16)(["a cat", "a dog", "a cat", "a bird", "a cow", "a fish"])
    ids = pair_ids(["1", "2", "3", "1", "5", "6"], tokens, 0, ["", "pet", "", "", "pet", ""])
    same = (ids[:, None] == ids[None]).any(dim=-1)
    expected = torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 2), (0, 3), (1, 4)):  # caption, image, group
        expected[i, j] = expected[j, i] = True
    assert torch.equal(same, expected)
    assert torch.equal(pair_ids(["1"], tokens[:1], 0), pair_ids(["1"], tokens[:1], 0, [""]))


def test_groups_for_only_some_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="1 groups for 2 pairs"):
        pair_ids(["1", "2"], CLIPTokenizer(16)(["a", "b"]), 0, ["x"])


@pytest.mark.parametrize(("parts", "sizes"), [(1, [7]), (3, [2, 2, 3]), (7, [1] * 7), (9, [1] * 7)])
def test_a_batch_is_split_in_order_into_non_empty_parts(parts: int, sizes: list[int]) -> None:
    rows = torch.arange(7)
    batch = CaptionBatch(
        rows[:, None, None, None], rows[:, None], [str(i) for i in range(7)], [f"{i}" for i in range(7)]
    )
    split = batch.split(parts)
    assert [len(part.keys) for part in split] == sizes
    assert torch.equal(torch.cat([part.tokens for part in split]), batch.tokens)
    assert [key for part in split for key in part.keys] == batch.keys
    assert all(part.groups == () for part in split)


class Copies(TorchDispatchMode):
    """Record copies to another device, and values that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = isinstance(result, torch.Tensor) and any(
            isinstance(x, torch.Tensor) and x.device != result.device for x in args
        )
        if moved or func is torch.ops.aten._local_scalar_dense.default:
            self.names.append(func._schema.name)
        return result


def test_a_step_copies_keys_alone_to_the_device_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All by ``to_device``, which does not synchronise; the hash's numbers once, whatever the texts' length."""
    asked: list[tuple[int, ...]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        asked.append(tuple(tensor.shape))
        return tensor.to(device)

    monkeypatch.setattr(duplicates, "to_device", to_device)
    duplicates._multipliers.cache_clear()
    with Copies() as seen:
        for length in (7, 12, 77):
            pair_ids(["1", "2"], torch.zeros(2, length, dtype=torch.long, device="meta"), 0)
    assert asked == [(2, 2), (128,), (2, 2), (2, 2)]
    assert seen.names == ["aten::_to_copy"] * len(asked)
