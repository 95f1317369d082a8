"""Draw the documentation's images from a finished run of the quickstart, each for light and for dark pages.

    python docs/images/draw.py runs/quickstart/version_0

Needs matplotlib (extra `eval`) and Chromium, whose executable is `chromium` or named by $CHROMIUM. Nothing is posed:
curves are the run's events, pages are what `lit-clip search` and `lit-clip evaluate` write for its last checkpoint.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lit_clip
from datamodules import OpenMojiClasses
from lit_clip.evaluation.report.chart_style import COLOURS, chart_settings, new_figure
from lit_clip.tools.html import thumbnail, write_page

HERE = Path(__file__).parent
MODES = {"light": 1, "dark": 0}  # Chromium's numbers of the preferred colour scheme
PAPER = {"light": ("#ffffff", "#222222"), "dark": ("#16181c", "#dddddd")}  # as in lit_clip/tools/templates/base.html
COLOURS_USED = 128  # of an image: screenshots of text and drawings look the same with them and take a third
ZERO_SHOT = {
    "trained_names": "training drawings, among all names",
    "line_art": "line drawings, among all names",
    "unseen_groups": "unseen drawings, among 9 groups",
    "unseen_names": "unseen drawings, among all names",
}
QUERIES = ["red heart", "airplane", "cat face"]


def main() -> None:
    """Draw all images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder: runs/quickstart/version_0")
    run = parser.parse_args().run
    checkpoint = run.absolute() / "checkpoints" / "last.ckpt"
    draw_training_curve(run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_nearest_names(checkpoint, folder)
        draw_search(checkpoint, folder)
        draw_report(checkpoint, folder)


def draw_training_curve(run: Path) -> None:
    """Training loss and zero-shot accuracy over the steps of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for mode, (paper, ink) in PAPER.items():
        colours = dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.labelcolor", "ytick.color"), ink
        )
        with chart_settings({**colours, "grid.color": "#8883", "font.size": 10}):
            figure, (loss, accuracy) = new_figure(3.2, ncols=2)
            figure.set_facecolor(paper)
            for axes in (loss, accuracy):
                axes.set_facecolor(paper)
                axes.grid(True)
                axes.set_xlabel("step")
            _line(loss, events.Scalars("train/loss"), COLOURS[5])
            loss.set_title("training loss")
            for place, (name, label) in enumerate(ZERO_SHOT.items()):
                _line(accuracy, events.Scalars(f"zero_shot/{name}/top1"), COLOURS[(place + 5) % 6], label, 100)
            accuracy.set_title("zero-shot top-1, %")
            accuracy.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.33))
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110, facecolor=paper)
        save(Image.open(data), "training_curve", mode)


def _line(axes: Any, scalars: list[Any], colour: str, label: str | None = None, times: float = 1) -> None:
    marker = "o" if len(scalars) < 20 else None
    values = [times * scalar.value for scalar in scalars]
    axes.plot([scalar.step for scalar in scalars], values, color=colour, label=label, marker=marker, markersize=4)


def draw_nearest_names(checkpoint: Path, folder: Path) -> None:
    """Every fifth drawing that the quickstart holds out, with its five nearest names of all."""
    model, images = lit_clip.load_model(str(checkpoint)), OpenMojiClasses("held_out")
    places = range(2, len(images), 8)[:20]
    names = model.encode(images.class_names)
    drawings: list[dict[str, Any]] = []
    for image, label in (images[place] for place in places):
        scores, nearest = (model.encode([image]) @ names.T)[0].topk(5)
        found = [(images.class_names[int(row)], float(score)) for row, score in zip(nearest, scores, strict=True)]
        drawings.append({"image": thumbnail(image), "name": images.class_names[label], "nearest": found})
    page = folder / "nearest_names.html"
    write_page(page, HERE / "nearest_names.html", title="nearest names", drawings=drawings)
    screenshot(page, "nearest_names", (1100, 574))


def draw_search(checkpoint: Path, folder: Path) -> None:
    """The page of ``lit-clip search`` among all drawings."""
    drawings, page = folder / "drawings", folder / "search.html"
    drawings.mkdir()
    images = OpenMojiClasses()
    for path, label in images.files:
        name = "".join(letter if letter.isalnum() else "_" for letter in images.class_names[label])
        shutil.copy(path, drawings / f"{name}.png")
    _command("search", str(drawings), *QUERIES, "--model", str(checkpoint), "--top_k", "6", "--sheet", str(page))
    screenshot(page, "search", (1280, 930))


def draw_report(checkpoint: Path, folder: Path) -> None:
    """The page of ``lit-clip evaluate``."""
    output = folder / "evaluation"
    suite = HERE.absolute().parents[1] / "configs" / "evaluation" / "bundled.yaml"
    # In its folder: the page names the model as it was typed.
    words = ("--model", checkpoint.name, "--suite", str(suite), "--output", str(output))
    _command("evaluate", *words, folder=checkpoint.parent)
    screenshot(output / "report.html", "report", (1100, 1000))


def _command(*words: str, folder: Path | None = None) -> None:
    subprocess.run([sys.executable, "-m", "lit_clip", *words], check=True, cwd=folder)


def screenshot(page: Path, name: str, size: tuple[int, int]) -> None:
    """Save what Chromium shows of a page, in light and in dark colours."""
    chromium = os.environ.get("CHROMIUM", "chromium")
    for mode, number in MODES.items():
        target = page.with_suffix(f".{mode}.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--blink-settings=preferredColorScheme={number}", f"--window-size={size[0]},{size[1]}"]
        command = [chromium, *flags, f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        save(Image.open(target), name, mode)


def save(image: Image.Image, name: str, mode: str) -> None:
    """Write ``NAME-MODE.png`` beside this file, with few colours."""
    small = image.convert("RGB").quantize(COLOURS_USED, dither=Image.Dither.NONE)
    small.save(HERE / f"{name}-{mode}.png", optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
