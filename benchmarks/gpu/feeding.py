"""From tar shards to steps: images per second of the data workers, of the GPU's decoder, and of ``Trainer.fit``."""

import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peers import architecture
from PIL import Image

from callbacks import Throughput
from datamodules import Captions
from gpu.fitting import Timed, fit
from gpu.inputs import named, texts_of
from gpu.setting import Row, Setting, attempt, gap, seconds_per_call
from lit_clip import LitCLIP

TARGET = 8000.0  # images per second, for ViT-B-32 with a margin
MEMORY, NEEDED = Path("/dev/shm"), 8 * 2**30  # bytes of the shards and of the workers' batches


def rows(setting: Setting) -> Iterator[Row]:
    # A container may have 64 MB there; elsewhere the files stay in the page cache.
    memory = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > NEEDED else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for side in (256, 512, 960):
            path = Path(folder) / str(side)
            yield attempt(setting, f"shards of {side} pixels", lambda path=path, side=side: write(setting, path, side))
            yield attempt(setting, f"{side} pixels: data workers", lambda path=path: loaded(setting, path), 8)
            what = f"{side} pixels: the GPU's decoder"
            yield attempt(setting, what, lambda side=side: decoded(setting, side), 2, cuda=True)
        yield attempt(setting, "512 pixels: fit", lambda: fitted(setting, Path(folder) / "512"), 20)


def workers(setting: Setting) -> int:
    return 0 if setting.tiny else max(1, len(os.sched_getaffinity(0)) - 2)


def jpegs(side: int, count: int = 16) -> list[bytes]:
    """Make JPEGs with detail at all scales, as photographs have, 4 by 3, with a shorter side of ``side``."""
    random, result = np.random.default_rng(0), []
    for _ in range(count):
        image = np.zeros((side, side * 4 // 3, 3))
        for cells in (4, 16, 64, side):
            noise = random.integers(0, 256, (cells, cells * 4 // 3, 3), dtype=np.uint8)
            grown = Image.fromarray(noise).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
            image += np.asarray(grown, dtype=float) * {4: 0.5, 16: 0.25, 64: 0.15}.get(cells, 0.1)
        file = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        result.append(file.getvalue())
    return result


def write(setting: Setting, folder: Path, side: int) -> Row:
    """Write pairs as tar shards in img2dataset's layout."""
    folder.mkdir()
    pairs, shards = (32, 2) if setting.tiny else (8192, 16)
    images, texts = jpegs(side, 2 if setting.tiny else 16), texts_of(pairs)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, pairs, shards):
                for name, content in (("jpg", images[number % len(images)]), ("txt", texts[number].encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"kilobytes": sum(map(len, images)) / len(images) / 1000, "pairs": pairs}


def data_of(setting: Setting, folder: Path, batch: int) -> Captions:
    tars = str(folder / "*.tar")
    return Captions(tars, tars, batch_size=batch, num_workers=workers(setting))


def loaded(setting: Setting, folder: Path) -> Row:
    """Read batches for a while, without a device."""
    data, batch = data_of(setting, folder, 8 if setting.tiny else 256), 8 if setting.tiny else 256
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    since, count = time.perf_counter(), 0
    for _ in batches:
        count += batch
        if time.perf_counter() - since > (0.0 if setting.tiny else 4.0):
            break
    rate = count / (time.perf_counter() - since)
    return {"images_per_second": rate, **gap(TARGET / rate, f"data workers at {folder.name} pixels")}


def decoded(setting: Setting, side: int) -> Row:
    """Decode on the GPU, in batches."""
    from torchvision.io import decode_jpeg

    files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in jpegs(side)] * 8
    seconds = seconds_per_call(lambda: decode_jpeg(files, device=setting.device), 5, setting)
    return {"images_per_second": len(files) / seconds}


def fitted(setting: Setting, folder: Path) -> Row:
    """Train from the shards."""
    steps, block, batch = (2, 1, 8) if setting.tiny else (60, 20, 512)
    timed, module = Timed(block), LitCLIP(architecture(named(setting, "ViT-B-32")))
    trainer = fit(
        setting,
        module,
        data_of(setting, folder, batch),
        steps,
        timed,
        Throughput(),
        log_every_n_steps=block,
    )
    waited = float(trainer.callback_metrics["train/data_wait_share"])
    rate = batch / timed.seconds()
    return {"samples_per_second": rate, "data_wait_share": waited, **gap(TARGET / rate, "fit from tar shards")}
