"""The end of a run with a recipe: the model before and after, on what it was not trained on."""

import csv
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
from callbacks import EMA, PatchDropout, Proof, print_results
from datamodules import Captions
from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.tools.images import open_image
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.towers import WORDS
from tests.test_module import trainer

NAMES = [f"{way} R@{k}" for k in (1, 5) for way in ("image to text", "text to image")]
Numbers = dict[str, list[float]]


def fit(
    folder: Path, table: Path, module: LitCLIP, *given: Callback, resumed: Path | None = None, **options: Any
) -> Any:
    """Train on a table, which is also what is validated."""
    settings = {"max_epochs": 1, "logger": CSVLogger(folder), "log_every_n_steps": 1, **options}
    training = trainer(folder, callbacks=callbacks.defaults(*given), **settings)
    data = Captions(str(table), str(table), batch_size=16, num_workers=0)
    training.fit(module, data, ckpt_path=resumed, weights_only=True)
    return training


def module_of(start: CLIPConfig | Path, rate: float = 2e-3) -> LitCLIP:
    torch.manual_seed(0)
    rates: Any = {"optimizer": partial(PaperAdamW, lr=rate), "lr_scheduler": partial(WarmupCosine, warmup_steps=1)}
    return LitCLIP(start, **rates) if isinstance(start, CLIPConfig) else LitCLIP(pretrained=start, **rates)


@pytest.fixture
def repeated(overfitted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A table with captions of several images, and images with several captions, twice the same one among them."""
    table, rows = overfitted[1], list(csv.DictReader(overfitted[1].open(encoding="utf-8")))
    pairs = [(row["image"], row["caption"]) for row in rows[:40]]
    pairs += [(rows[0]["image"], "a tiger's face"), (rows[1]["image"], "another one"), (rows[2]["image"], "pizza")]
    pairs += [(rows[3]["image"], rows[4]["caption"]), (rows[5]["image"], rows[4]["caption"]), pairs[6]]
    lines = [f'{(table.parent / image).resolve()},"{caption}"' for image, caption in pairs]
    path = tmp_path / "repeated.csv"
    path.write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return path


def recalls(model: CLIP, table: Path) -> dict[str, float]:
    """Return the recalls by a plain loop over all images and texts; equal texts count as one."""
    model.eval()
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    pairs = [(row["image"], row["caption"]) for row in rows]
    with torch.no_grad():
        paths = {name: model.preprocess(open_image(table.parent / name)) for name in dict(pairs)}
        image = {name: model.encode_image(pixels[None], normalize=True)[0] for name, pixels in paths.items()}
        text = {caption: model.encode(caption) for _, caption in pairs}

    def found(query: Tensor, candidates: dict[str, Tensor], wanted: set[str], k: int) -> bool:
        best = max(float(query @ candidates[name]) for name in wanted)
        return sum(float(query @ other) >= best for name, other in candidates.items() if name not in wanted) < k

    result = {}
    for k in (1, 5):
        of_image = [found(image[name], text, {b for a, b in pairs if a == name}, k) for name in image]
        of_row = [found(text[caption], image, {a for a, b in pairs if b == caption}, k) for _, caption in pairs]
        result[f"image to text R@{k}"] = 100 * sum(of_image) / len(of_image)
        result[f"text to image R@{k}"] = 100 * sum(of_row) / len(of_row)
    return result


def told(out: str, name: str = "held-out") -> Numbers:
    """Return before, after, difference and the ends of its interval, for each metric of a set in the table."""
    table = out[out.index("Before and after") :].split("report:")[0]
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in table.splitlines()]
    rows: dict[str, list[str]] = {}
    for cells in lines:
        if len(cells) == 5 and cells[1]:
            rows[cells[0]] = cells[2:]
        elif len(cells) == 5 and rows:  # a name over two lines
            last, values = rows.popitem()
            rows[f"{last} {cells[0]}"] = values
    rows = {key.removeprefix(f"{name} "): values for key, values in rows.items() if key.startswith(f"{name} ")}
    return {
        key: [float(number) for number in re.findall(r"[-+]?[\d.]+", " ".join(values))] for key, values in rows.items()
    }


def test_before_and_after_are_the_recalls_of_both_checkpoints(
    overfitted: tuple[Path, Path], repeated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    last = ModelCheckpoint(tmp_path, "last")
    fit(tmp_path, repeated, module_of(overfitted[0]), Proof(), last)
    rows = told(capfd.readouterr().out)
    before, after = (recalls(load_model(path), repeated) for path in (overfitted[0], tmp_path / "last.ckpt"))
    assert before != after
    for name in NAMES:
        assert rows[name][:2] == [pytest.approx(before[name], abs=0.051), pytest.approx(after[name], abs=0.051)], name
        gap, low, high = rows[name][2:]
        assert gap == pytest.approx(after[name] - before[name], abs=0.11)
        assert low <= gap <= high


class Misled(LitCLIP):
    """Says that its first epoch was the best."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("best", -float(self.current_epoch))


@pytest.mark.parametrize("averaged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_is_the_model_that_the_run_says_to_take_and_the_module_keeps_its_last_weights(
    averaged: bool,
    overfitted: tuple[Path, Path],
    repeated: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(print_results, "FEW", 0)
    best = ModelCheckpoint(tmp_path, "best", monitor="best", mode="max")
    last = ModelCheckpoint(tmp_path, "last")
    module = Misled(
        pretrained=overfitted[0],
        optimizer=partial(PaperAdamW, lr=2e-3),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
    )
    fit(tmp_path, repeated, module, Proof(), best, last, *[EMA(0.5)] * averaged, max_epochs=3)
    rows = told(capfd.readouterr().out)
    expected = recalls(load_model(tmp_path / "best.ckpt"), repeated)
    assert [rows[name][1] for name in NAMES] == pytest.approx([expected[name] for name in NAMES], abs=0.051)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    others = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(saved[name], others[name]) for name in saved)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_worse_is_said_before_the_table_with_what_to_try(
    overfitted: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, overfitted[1], module_of(overfitted[0], 0.3), Proof())
    out = capfd.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("worse than the model as it started on held-out")]
    assert "100.0 -> " in line
    assert "--model.optimizer.lr" in line
    assert out.index(line) < out.index("Before and after")
    assert all(rows[4] < 0 for name, rows in told(out).items() if name in NAMES)


def test_a_run_that_is_no_worse_has_no_such_line(
    overfitted: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, overfitted[1], module_of(overfitted[0], 1e-9), Proof())
    out = capfd.readouterr().out
    assert "worse than" not in out
    assert {tuple(values[2:]) for values in told(out).values()} == {(0.0, 0.0, 0.0)}
    assert told(out)["10 nearest images stay"][:2] == [100, 100]


@pytest.mark.slow
def test_neighbours_are_those_of_a_plain_loop(
    overfitted: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, overfitted[1], module_of(overfitted[0]), Proof(), ModelCheckpoint(tmp_path, "last"))
    rows = list(csv.DictReader(overfitted[1].open(encoding="utf-8")))
    near = []
    for path in (overfitted[0], tmp_path / "last.ckpt"):
        image = load_model(path).encode([overfitted[1].parent / row["image"] for row in rows])
        score = (image @ image.T).fill_diagonal_(-2)
        near.append([set(row) for row in score.argsort(dim=1, descending=True)[:, :10].tolist()])
    expected = sum(len(one & two) for one, two in zip(*near, strict=True)) / len(rows) * 10
    found = told(capfd.readouterr().out)["10 nearest images stay"]
    assert found[:2] == [100, pytest.approx(expected, abs=0.2)]  # rounding decides some


@pytest.fixture
def classes(overfitted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A folder with three folders of two drawings, one of them with a wrong name."""
    rows = list(csv.DictReader(overfitted[1].open(encoding="utf-8")))
    for number, row in enumerate(rows[:12]):
        name = rows[number // 2 * 2]["caption"].replace("/", " ").replace("_", " ")
        file = tmp_path / "kinds" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((overfitted[1].parent / row["image"]).read_bytes())
    return tmp_path / "kinds"


@pytest.mark.slow
def test_the_rest_is_a_folder_of_classes_or_a_table(
    overfitted: tuple[Path, Path], repeated: Path, classes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proof = Proof(rest=[str(classes), str(repeated)])
    fit(tmp_path, overfitted[1], module_of(overfitted[0]), proof, ModelCheckpoint(tmp_path, "last"))
    out = capfd.readouterr().out
    names = sorted(folder.name for folder in classes.iterdir())
    for place, path in enumerate((overfitted[0], tmp_path / "last.ckpt")):
        model = load_model(path)
        texts, right = zero_shot_classifier(model, names, ["a photo of a {}."]), []
        for file in classes.rglob("*.png"):
            right.append(names[int((model.encode(file) @ texts).argmax())] == file.parent.name)
        (values,) = told(out, "kinds").values()
        assert values[place] == pytest.approx(100 * sum(right) / len(right), abs=0.051)
        expected = recalls(model, repeated)
        for name in NAMES:
            assert told(out, "repeated")[name][place] == pytest.approx(expected[name], abs=0.051)
    assert "nearest images" not in out


def test_training_is_the_same_to_the_last_bit(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    states = []
    for number, given in enumerate(([], [Proof()])):
        module = module_of(tiny_config)
        fit(tmp_path / str(number), caption_table, module, PatchDropout(0.5), *given, max_epochs=2)
        states.append((module.state_dict(), torch.get_rng_state()))
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    assert torch.equal(states[0][1], states[1][1])


def test_a_resumed_run_keeps_what_was_measured_before_its_first_step(
    overfitted: tuple[Path, Path], repeated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = recalls(load_model(overfitted[0]), repeated)
    fit(tmp_path, repeated, module_of(overfitted[0], 0.1), Proof(), ModelCheckpoint(tmp_path, "last"))
    again = module_of(load_model(overfitted[0]).config)  # as the command line, which loads no other weights then
    capfd.readouterr()
    fit(tmp_path, repeated, again, Proof(), resumed=tmp_path / "last.ckpt", max_epochs=2)
    rows = told(capfd.readouterr().out)
    assert [rows[name][0] for name in NAMES] == pytest.approx([start[name] for name in NAMES], abs=0.051)
    assert "10 nearest images stay" in rows


def test_a_run_that_began_without_it_says_so(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    fit(tmp_path, caption_table, module_of(tiny_config), ModelCheckpoint(tmp_path, "last"))
    fit(tmp_path, caption_table, module_of(tiny_config), Proof(), resumed=tmp_path / "last.ckpt", max_epochs=2)
    assert "Proof: the run is not compared" in caplog.text
    assert "Before and after" not in capfd.readouterr().out


@pytest.mark.parametrize(("options", "says"), [({"limit_val_batches": 0}, True), ({"fast_dev_run": True}, False)])
def test_without_validation_nothing_is_compared(
    options: dict[str, Any],
    says: bool,
    tiny_config: CLIPConfig,
    caption_table: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: Any,
) -> None:
    fit(tmp_path, caption_table, module_of(tiny_config), Proof(), **options)
    assert ("Proof: the run is not compared with the model before: limit_val_batches" in caplog.text) == says
    assert "Before and after" not in capfd.readouterr().out


def test_rest_that_is_not_there_is_one_line_before_training(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="Proof.rest: nowhere") as error:
        fit(tmp_path, caption_table, module_of(tiny_config), Proof(rest=["nowhere"]))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("charts")
def test_the_page_has_the_table_curves_and_examples_and_fetches_nothing(
    overfitted: tuple[Path, Path], repeated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, repeated, module_of(overfitted[0], 0.1), Proof(examples=9), max_epochs=2)
    page = (Path(run.logger.log_dir) / "report.html").read_text(encoding="utf-8")
    rows = told(capfd.readouterr().out)
    for name in NAMES:
        assert f"held-out {name}" in page
        assert f"{rows[name][1]:.1f}" in page
    assert page.index("worse than") < page.index("before and after")
    assert page.count("<figure>") == page.count('src="data:image/jpeg') == 9
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert len(re.findall("https?://", page)) == len(re.findall("http://www.w3.org/", page))


@pytest.mark.parametrize("kind", ["trained", pytest.param("heads alone", marks=pytest.mark.slow)])
def test_two_ranks_compare_the_numbers_of_one(
    kind: str, folders: dict[str, Path], overfitted: tuple[Path, Path], classes: Path, tmp_path: Path, ranks: Any
) -> None:
    rows = list(csv.DictReader(overfitted[1].open(encoding="utf-8")))[:60]
    captions = ["a dog" if number % 9 == 0 else f"{WORDS[number % 20]} {WORDS[number // 20]}" for number in range(60)]
    lines = [
        f"{(overfitted[1].parent / row['image']).resolve()},{text}" for row, text in zip(rows, captions, strict=True)
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    start = overfitted[0] if kind == "trained" else folders["bert"]
    given = (tmp_path / "pairs.csv", start, classes)
    found = [ranks("proof", world, *given, script="ranks_callbacks.py") for world in (1, 2)]
    assert len(found[0]) == 5
    for one, two in zip(*found, strict=True):
        assert one[:2] == two[:2]
        # Two ranks round features in another way, which may decide an order.
        assert one[2:] == pytest.approx(two[2:], abs=0.0 if kind == "trained" else 0.05), one[0]
