"""The end of a run with a recipe: the model before and after, on what it was not trained on."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import callbacks
from callbacks import EMA, Proof
from datamodules import Captions
from lit_clip import load_model
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.test_module import trainer


def fit(
    folder: Path, table: Path, model: LitCLIP, *given: Callback, resumed: Path | None = None, **options: Any
) -> Any:
    """Train on a table, which is also what is validated."""
    settings = {"max_epochs": 1, "logger": CSVLogger(folder), "log_every_n_steps": 1, **options}
    training = trainer(folder, callbacks=callbacks.defaults(*given), **settings)
    data = Captions(str(table), str(table), batch_size=16, num_workers=0)
    training.fit(model, data, ckpt_path=resumed, weights_only=True)
    return training


def module_of(start: Any, rate: float = 1e-3) -> LitCLIP:
    torch.manual_seed(0)
    rates = {"optimizer": partial(PaperAdamW, lr=rate), "lr_scheduler": partial(WarmupCosine, warmup_steps=1)}
    return LitCLIP(start, **rates) if isinstance(start, CLIPConfig) else LitCLIP(pretrained=start, **rates)


def recalls(model: CLIP, table: Path) -> dict[str, float]:
    """Return recall@k in both directions by a plain loop; equal texts count as one."""
    data = Captions(str(table), str(table), num_workers=0)
    data.preprocessing, data.tokenize = model.preprocessing, model.tokenizer
    data.setup("validate")
    images, texts, keys, captions = [], [], [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            images.append(model.eval().encode_image(model.normalize(batch.images), normalize=True))
            texts.append(model.encode_text(batch.tokens, normalize=True))
            keys += batch.keys
            captions += batch.captions
    image = dict(zip(keys, torch.cat(images), strict=True))
    text = dict(zip(captions, torch.cat(texts), strict=True))
    right = set(zip(keys, captions, strict=True))

    def found(query: Tensor, candidates: dict[str, Tensor], wanted: set[str], k: int) -> bool:
        best = max(float(query @ candidates[name]) for name in wanted)
        return sum(float(query @ other) >= best for name, other in candidates.items() if name not in wanted) < k

    result = {}
    for k in (1, 5):
        of_image = [found(image[key], text, {b for a, b in right if a == key}, k) for key in image]
        of_row = [found(text[caption], image, {a for a, b in right if b == caption}, k) for caption in captions]
        result[f"image to text recall@{k}"] = sum(of_image) / len(of_image)
        result[f"text to image recall@{k}"] = sum(of_row) / len(of_row)
    return result


def told(out: str) -> dict[str, list[float]]:
    """Return the numbers of the table's rows, by set and metric."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    rows: dict[str, list[str]] = {}
    name = ""
    for cells in lines:
        if len(cells) == 5 and cells[1]:
            name = cells[0]
            rows[name] = cells[2:4]
        elif len(cells) == 5:  # a name over several lines
            rows[f"{name} {cells[0]}"] = rows.pop(name)
            name = f"{name} {cells[0]}"
    return {name.partition(": ")[2]: [float(value) for value in values] for name, values in rows.items()}


def test_smoke(overfitted: tuple[Path, Path], caption_table: Path, tmp_path: Path, capfd: Any) -> None:
    fit(tmp_path, caption_table, module_of(overfitted[0], 1.0), Proof())
    print(capfd.readouterr().out)
    assert 0
