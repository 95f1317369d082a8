"""Time epochs of ``fit`` with frozen layers, plainly and with ``callbacks.FrozenFeatures``, alternating in one process.

    python benchmarks/frozen_features.py [--pairs 3] [--images 256] [--batch 64] [--unlock 4]

The encoders are as large as those of ``configs/pretrained_encoders.yaml``, with random weights: EfficientNet-Lite0, of
which the last ``--unlock`` blocks and the head are trained, and a text encoder of MiniLM's size, of which
the projection is.

The images are JPEGs of 640 x 480 from the photographs of scikit-image and scikit-learn. An epoch is timed from its
start to its last step, with one data worker, without validation; the stored features are there already. The time to
encode every image (once for training and once for validation) and caption is printed too.
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from image_pipeline import write_table
from lightning.pytorch import Callback, Trainer
from results import compared, pair_parser, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from callbacks import FrozenFeatures
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast

MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_text_encoder(folder: Path, table: Path) -> None:
    """Write the configuration of a BERT of MiniLM's size, and a tokenizer of the captions' words."""
    words = sorted(set(table.read_text(encoding="utf-8").split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    BertConfig(pad_token_id=0, **MINILM).save_pretrained(folder)


class Timer(Callback):
    """Measure the seconds before training and of its only epoch."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        now = time.perf_counter()
        self.before, self.started = now - self.started, now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.epoch = time.perf_counter() - self.started


def run(folder: Path, batch: int, unlock: int, cached: bool) -> Timer:
    """Train one epoch."""
    torch.manual_seed(0)
    text = HuggingFaceTextConfig(str(folder), pretrained=False, context_length=32)
    freeze = Freeze(UnlockLast(unlock), UnlockLast(0))
    module = LitCLIP(CLIPConfig(256, TimmConfig("tf_efficientnet_lite0"), text), freeze=freeze)
    table = str(folder / "pairs.tsv")
    data = Captions(table, table, batch_size=batch, num_workers=1, augmentation=[])
    timer = Timer()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[timer, *([FrozenFeatures(str(folder / "features"))] if cached else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return timer


def main() -> None:
    arguments = pair_parser(__doc__)
    arguments.set_defaults(pairs=3)
    arguments.add_argument("--images", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--unlock", type=int, default=4, help="trainable blocks of the image encoder")
    options = arguments.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text_encoder(folder, write_table(folder, (640, 480), options.images))
        settings = (folder, options.batch, options.unlock)
        first = run(*settings, cached=True)
        times = [(run(*settings, cached=False).epoch, run(*settings, cached=True).epoch) for _ in range(options.pairs)]
        size = sum(file.stat().st_size for file in folder.glob("features/*/values"))
    found = compared(
        f"frozen_features/unlock_last_{options.unlock}",
        f"epoch of encoders as large as those of that config, {options.images} pairs, batch {options.batch}",
        times,
        peer="without FrozenFeatures",
        figures={"seconds_to_encode": first.before, "bytes_per_pair": size / options.images},
    )
    print(f"{found.title}: plain {found.peers:.1f} s, stored {found.ours:.1f} s, times as fast: {found.ratio}")
    print(f"encoding: {first.before:.1f} s, {size / options.images:,.0f} bytes for each pair")
    save(options.json, found)


if __name__ == "__main__":
    main()
