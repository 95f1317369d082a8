"""The page for those who come from open_clip."""

import argparse
import re
from typing import Any

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs/from_open_clip.md"


# Of open_clip 4's usage, beside those of 3.3, and those that it has no more.
NEW_IN_4 = """
    audio-ext pretrained-audio audio-fill audio-trunc audio-fusion audio-int16-normalize audio-zeroshot-dataset
    audio-zeroshot-split audio-zeroshot-audio-key audio-zeroshot-target-key audio-zeroshot-class-key
    audio-zeroshot-template audio-zeroshot-workers audio-zeroshot-multiprocessing-context audio-multiprocessing-context
    image-key max-image-pixels text-key json-text-key json-text-key-probs opt-kwargs opt-fallback-list text-layer-decay
    image-layer-decay audio-layer-decay wd-exclude text-pooler-own-group val-retrieval-chunk-size
    val-retrieval-precision torchcompile-strategy torchcompile-backend torchcompile-mode fsdp
    fsdp-no-reshard-after-forward fsdp-offload-cpu fsdp-checkpoint log-metric-every-n-steps train-loss-ema-samples
    use-naflex force-naflex-vision naflex-num-train-image-tokens naflex-patch-sizes naflex-patch-size-probs
    naflex-seq-lens naflex-seq-len-probs naflex-max-tokens-per-batch naflex-max-text-tokens naflex-batch-divisor
    naflex-loss-scale length-bucketing bucket-pool bucket-chunk bucket-prefetch-pools naflex-pad-multiple
    text-pad-multiple
"""
GONE_IN_4 = {"--torchscript", "--trace", "--horovod"}


def open_clips_flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options of open_clip's training command."""
    params = pytest.importorskip("open_clip_train.params")
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parsers.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(InterruptedError):
        params.parse_args([])
    return [option for action in parsers[0]._actions for option in action.option_strings if option.startswith("--")]


def test_the_page_for_those_who_come_from_open_clip_has_every_flag_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of lit-clip that it names are parsed by tests/test_readme.py."""
    rows = re.findall(r"^\| (`--[^|]*) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    flags = [flag for row, _ in rows for flag in re.findall(r"`(--[\w-]+)`", row)]
    known = {f"--{flag}" for flag in NEW_IN_4.split()} | GONE_IN_4 | set(open_clips_flags(monkeypatch))
    assert sorted(flags) == sorted(known - {"--help", "--visual-layer-decay"})  # another name of --image-layer-decay
