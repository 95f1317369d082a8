"""Addresses with passwords in the image columns of local tables: refused in one line, and the password is nowhere."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.open_source import open_source
from lit_clip.errors import BadSample

Cli = Callable[..., subprocess.CompletedProcess[str]]
ADDRESS = "http://user:s3cretword@127.0.0.1:1/x.png"  # nobody listens there
TABLE, ON_CPU = ["t.csv"], ["--num_workers", "0", "--accelerator", "cpu"]
FIT = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size", "2"]
COMMANDS = {
    "embed": ["embed", *TABLE, "--output", "f.parquet", *ON_CPU],
    "embed, skipping": ["embed", *TABLE, "--output", "f.parquet", "--on_error", "skip", *ON_CPU],
    "score": ["score", *TABLE, "--output", "s.parquet", *ON_CPU],
    "score, skipping": ["score", *TABLE, "--output", "s.parquet", "--on_error", "skip", *ON_CPU],
    "mine": ["mine", *TABLE, "--output", "m.jsonl", *ON_CPU],
    "inspect": ["inspect", *TABLE, "--num_workers", "0"],
    "shard": ["shard", *TABLE, "out", "--workers", "0"],
    "overlap": ["overlap", "classes", "--train", *TABLE, "--num_workers", "0"],
    "classify": ["classify", "0.png", "--examples", "examples.csv", "--num_workers", "0"],
    "evaluate": ["evaluate", "--suite", "suite.yaml", "--output", "results.json", *ON_CPU],
    "evaluate, skipping": ["evaluate", "--suite", "suite.yaml", "--output", "out", "--on_error", "skip", *ON_CPU],
    "a model": ["embed", "0.png", "--output", "f.parquet", "--model", ADDRESS, *ON_CPU],
    "a model, one slash": ["embed", "0.png", "--output", "f.parquet", "--model", ADDRESS.replace("//", "/"), *ON_CPU],
    "inspect, one slash": ["inspect", "one.csv", "--num_workers", "0"],
    "fit": ["fit", "--data.train", *TABLE, *FIT],
    "fit, skipping": ["fit", "--data.train", *TABLE, "--data.val", *TABLE, "--data.bad_samples.on_error", "skip", *FIT],
    "other_image": ["fit", "--data.train", "others.csv", "--data.columns.other_image", "back", *FIT],
}
LISTS = (
    *("embed, skipping", "score, skipping", "fit, skipping", "evaluate, skipping", "overlap"),
    *("a model", "a model, one slash", "inspect, one slash"),
)  # in a file; the terminal has no word of it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for row in range(7):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
    images = [*(f"{row}.png" for row in range(7)), ADDRESS]
    rows = [f"{image},a photo of number {row}" for row, image in enumerate(images)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    (tmp_path / "one.csv").write_text((tmp_path / "t.csv").read_text().replace("http://", "http:/"))
    others = [f"{row}.png,a photo of number {row},{ADDRESS}" for row in range(7)]
    (tmp_path / "others.csv").write_text("\n".join(["image,caption,back", *others]) + "\n")
    rows = [f"{image},class {row % 2}" for row, image in enumerate(images)]
    (tmp_path / "examples.csv").write_text("\n".join(["image,classes", *rows]) + "\n")
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    for name in ("class 0", "class 1"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "classes" / name / "a.png")
    data = "{class_path: datamodules.evaluation.LabelledTable, init_args: {path: labels.csv}}"
    (tmp_path / "suite.yaml").write_text(f"sets: {{mine: {{data: {data}, metric: top1, templates: ['{{}}']}}}}\n")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_or_writes_the_password(name: str, folder: Path, cli: Cli, tiny_checkpoint: Path) -> None:
    words = COMMANDS[name]
    model = [] if words[0] in ("fit", "inspect", "shard") or "--model" in words else ["--model", str(tiny_checkpoint)]
    given = set(folder.iterdir())
    done = cli(*words, *model)
    assert "s3cretword" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert name in LISTS or "user:***@127.0.0.1" in done.stdout + done.stderr
    for file in folder.rglob("*"):
        if file.is_file() and file not in given:
            assert b"s3cretword" not in file.read_bytes(), file


def test_an_address_in_a_local_table_is_a_bad_sample_and_no_path(folder: Path) -> None:
    source = open_source([str(folder / "t.csv")])
    for read in (source.read, source.key, source.image_identity, lambda row: source.load(row, None)):
        with pytest.raises(BadSample, match=r"t.csv row 9: http://user:\*\*\*@127.0.0.1:1/x.png is an address"):
            read(7)
