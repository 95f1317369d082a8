"""Images are found, read and encoded: all commands refuse the same files, and no row is lost or replaced."""

import io
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import EpsImagePlugin, Image

from datamodules import ImageFolderClasses
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.image_files import find_images, images_in
from lit_clip.embedding.reading import ImageBatches, encoded_batches, in_batches, row_means
from lit_clip.errors import BadSample, InputError
from lit_clip.evaluation.set_encoding import SetEncoder
from lit_clip.evaluation.store import FeatureStore
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.tools import hardware
from lit_clip.tools.hardware import autocast, check_precision
from lit_clip.tools.images import MAX_PIXELS, MOST_ELONGATED, open_image
from tests.conftest import lit_clip_command
from tests.datamodules.pairs.test_folder import deep
from tests.fuzz.samples import image


def refused_files() -> dict[str, bytes]:
    """Return files that Pillow could open only with gigabytes of memory, a very slow resize or Ghostscript."""
    bomb, thread, eps = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(bomb, "BMP")
    header = bytearray(bomb.getvalue())
    header[18:26] = (20_000).to_bytes(4, "little") * 2  # width and height
    Image.new("L", (MOST_ELONGATED + 1, 1)).save(thread, "PNG")
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    assert MAX_PIXELS < 20_000**2
    return {"bomb.bmp": bytes(header), "thread.png": thread.getvalue(), "program.png": eps.getvalue()}


@pytest.fixture(params=list(refused_files()))
def refused(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to refuse, in a class folder beside a readable image; starting another program fails the test."""
    path = tmp_path / "set/cat" / request.param
    path.parent.mkdir(parents=True)
    path.write_bytes(refused_files()[request.param])
    image(0, 40, 36).save(path.with_name("a.png"))

    def started(*words: Any, **_: Any) -> None:
        raise AssertionError(f"{words} was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.chdir(tmp_path)
    return path.relative_to(tmp_path)


def problem_in_training(path: Path) -> str:
    """Return the problem that training reports for a file, without the table row and the path."""
    with pytest.raises(BadSample) as error:
        open_image(path, "captions.csv row 2")
    return str(error.value).partition(f"{path} ")[2].partition(";")[0]


@pytest.mark.parametrize(
    "words",
    [
        ["embed", "set", "--output", "features.npy", "--accelerator", "cpu", "--num_workers", "0"],
        ["classify", "set", "--classes", "cat", "dog", "--output_file", "out.csv", "--num_workers", "0"],
        ["search", "set", "kite", "--num_workers", "0"],
        ["locate", "set", "kite"],
    ],
)
def test_commands_refuse_what_training_refuses(refused: Path, words: list[str], tiny_checkpoint: Path) -> None:
    """And list it if it may be skipped."""
    problem = problem_in_training(refused)
    with pytest.raises(InputError) as error:
        run_command([*words, "--model", str(tiny_checkpoint)])
    assert str(error.value) == f"{refused}: cannot read this image {problem}; fix or remove it, or set --on_error skip"
    run_command([*words, "--model", str(tiny_checkpoint), "--on_error", "skip"])
    (listed,) = Path().rglob("*skipped.txt")
    assert problem in listed.read_text()


def test_a_query_image_is_refused_before_the_folder_is_encoded(refused: Path, tiny_checkpoint: Path) -> None:
    words = ["set", "--image", str(refused), "--model", str(tiny_checkpoint), "--num_workers", "0"]
    with pytest.raises(InputError) as error:
        run_command(["search", *words])
    assert str(error.value) == f"{refused}: cannot read this image {problem_in_training(refused)}; fix or remove it"
    assert sorted(path.name for path in Path("set").rglob(".*")) == []


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_evaluation_refuses_what_training_refuses(refused: Path, on_error: Any, tiny_checkpoint: Path) -> None:
    images, model, problem = ImageFolderClasses("set"), load_model(tiny_checkpoint), problem_in_training(refused)
    settings = EncodingSettings(num_workers=0, accelerator="cpu", on_error=on_error)
    store = FeatureStore(model, Path("cache"), settings)
    encoder = SetEncoder(2, 0, on_error, "ZeroShot")
    if on_error == "error":
        for encode in (
            lambda: store.features(images, "set"),
            lambda: encoder.encode(model, images, model.encode_image, "set"),
        ):
            with pytest.raises(InputError) as error:
                encode()
            assert problem in str(error.value)
        return
    for _ in range(2):  # computed, and read
        skipped = store.features(images, "set").skipped
        assert [key for key, _ in skipped] == [f"cat/{refused.name}"]
        assert problem in skipped[0][1]
    with pytest.warns(UserWarning, match="1 of 2 images are skipped"):
        assert encoder.encode(model, images, model.encode_image, "set").rows == [0]


@pytest.mark.parametrize("damaged", ["visual.", "ln_final."])
@pytest.mark.parametrize(
    "command", [["embed", "--output", "f.npy"], ["search", "kite"], ["classify", "--classes", "a", "b"]]
)
def test_features_that_are_not_numbers_end_a_command_with_one_line(
    command: list[str], damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    image(0, 40, 36).save("set/a.png")
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if damaged in name)
    checkpoint["state_dict"][name].fill_(3e38)  # finite
    torch.save(checkpoint, "large.ckpt")
    words = [command[0], "set", *command[1:], "--model", "large.ckpt", "--num_workers", "0"]
    if command[0] == "embed" and damaged == "ln_final.":
        run_command([*words, "--accelerator", "cpu"])  # needs no text
        return
    with pytest.raises(InputError, match="features that are not finite; check the model's weights") as error:
        run_command([*words, "--accelerator", "cpu"] if command[0] == "embed" else words)
    assert "\n" not in str(error.value)
    assert not Path("f.npy").exists()
    assert not Path("results.html").exists()


@pytest.mark.parametrize(
    ("words", "number"),
    [  # the numbers are told apart nowhere but in load_model
        (["embed", "set", "--output", "f.npy", "--model", "bad.ckpt"], torch.nan),
        (["search", "set", "kite", "--model", "bad.ckpt"], -torch.inf),
        (["classify", "set", "--classes", "a", "b", "--model", "bad.ckpt"], torch.nan),
        (["validate", "--ckpt_path", "bad.ckpt", "--data.val", "pairs.csv"], -torch.inf),
        (["fit", "--ckpt_path", "bad.ckpt", "--data.train", "pairs.csv", "--data.val", "pairs.csv"], torch.nan),
        ([], torch.nan),
        ([], -torch.inf),
    ],
    ids=lambda each: (each[0] if each else "load_model") if isinstance(each, list) else str(each),
)
def test_a_checkpoint_whose_weights_are_not_numbers_is_one_line_that_names_the_weight(
    words: list[str], number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    image(0, 40, 36).save("set/a.png")
    Path("pairs.csv").write_text("image,caption\nset/a.png,a kite\n")
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    name = list(checkpoint["state_dict"])[-1]
    checkpoint["state_dict"][name].view(-1)[-1] = number
    torch.save(checkpoint, "bad.ckpt")
    line = f"bad.ckpt: {name} holds NaN or infinity; its training diverged, or the file is damaged: use another"
    if words:
        done = lit_clip_command(tmp_path, *words)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"lit-clip: error: {line}")
        assert "Traceback" not in done.stderr
    else:
        with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
            load_model("bad.ckpt")


class Films:
    """Row i has i + 1 images, but row 3 cannot be read and row 5 has none."""

    def __len__(self) -> int:
        return 7

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]:
        if row == 3:
            raise BadSample("film 3", "broken film", "no such codec")
        return f"film {row}", [] if row == 5 else [image(10 * row + frame, 40, 36) for frame in range(row + 1)]


@pytest.mark.parametrize(
    ("rows_at_once", "batch_size", "num_workers"),
    [(1, 1, 0), (1, 3, 2), (1, 64, 0), (2, 1, 0), (2, 3, 0), (2, 64, 2), (7, 1, 2), (7, 3, 0), (7, 64, 0)],  # pairwise
)
def test_features_do_not_depend_on_batch_size_or_workers(
    rows_at_once: int, batch_size: int, num_workers: int, tiny_config: CLIPConfig
) -> None:
    model = CLIP(tiny_config).eval()
    batches = in_batches(range(7), rows_at_once)
    found: dict[int, torch.Tensor] = {}
    notes, unreadable = [], []

    def note(row: int, name: str, image: Image.Image) -> str:
        return f"{row}: {name} {image.size}"

    for batch, features in encoded_batches(model, Films(), batch_size, num_workers, batches=batches, note=note):
        assert len(features) == sum(batch.counts) == len(batch.notes)
        notes += batch.notes
        unreadable += batch.unreadable
        if batch.rows:
            found |= zip(batch.rows, row_means(features, batch.counts), strict=True)
    assert list(found) == [0, 1, 2, 4, 6]
    assert notes == [f"{row}: film {row} (40, 36)" for row in found for _ in range(row + 1)]
    assert [tuple(row) for row in unreadable] == [
        (3, "broken film", "film 3: no such codec"),
        (5, "cannot be read", "film 5: has no image"),
    ]
    for row, feature in found.items():
        frames = torch.stack([model.preprocess(frame) for frame in Films().key_and_images(row)[1]])
        with torch.no_grad():
            expected = model.encode_image(frames, normalize=True).mean(dim=0)
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-6)


def test_a_stop_file_stops_reading(tmp_path: Path, tiny_config: CLIPConfig) -> None:
    batches = ImageBatches(Films(), in_batches(range(3), 1), CLIP(tiny_config).preprocessing, stop=tmp_path / "stop")
    assert batches[1].rows == [1]
    (tmp_path / "stop").touch()
    assert batches[1] == (None, [], [], [], [], None)


def test_loading_leaves_the_global_random_state_alone(tiny_config: CLIPConfig) -> None:
    model = CLIP(tiny_config).eval()
    before = torch.get_rng_state()
    list(encoded_batches(model, Films(), batch_size=4, num_workers=2))
    assert torch.equal(torch.get_rng_state(), before)


def names(folder: Path) -> list[str]:
    return [file.key for file in images_in(folder)]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "a.png", folder / "sub" / "b.png", elsewhere / "c.png", elsewhere / "deep" / "d.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)
    (elsewhere / "deep" / "back").symlink_to(folder)
    (folder / "one.png").symlink_to(elsewhere / "c.png")
    (folder / "self").symlink_to(folder / "self")
    assert names(folder) == ["a.png", "linked/c.png", "linked/deep/d.jpg", "one.png", "sub/b.png"]


def test_folders_are_walked_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (deep(tmp_path / "top", 1050) / "a.png").write_bytes(b"")
    found = names(tmp_path)
    subprocess.run(["rm", "-r", str(tmp_path / "top")], check=True)  # pytest's and shutil's removal recurse
    assert found == ["top/" + "d/" * 1050 + "a.png"]


def test_folder_that_cannot_be_read_is_an_error_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked\x1b[31m").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    scandir = os.scandir

    def refusing(path: Path) -> object:  # root can read any folder
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="locked.*cannot be read .Permission denied..*--on_error skip"):
        images_in(tmp_path)
    assert len(find_images([str(tmp_path)], "skip")) == 1
    said = capsys.readouterr().err
    assert "cannot be read: 1; the first: " in said
    assert "locked\\x1b[31m" in said.replace("\n", "")


@pytest.mark.parametrize(("has_instructions", "lines"), [(True, 0), (False, 1), (None, 0)])
def test_emulated_bfloat16_is_one_line(
    has_instructions: bool | None, lines: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda accelerator: has_instructions)
    check_precision("32-true", "cpu")
    assert not recwarn
    check_precision("bf16-mixed", "cpu")
    assert len(recwarn) == lines
    assert all("--precision bf16-mixed: emulated on this processor" in str(each.message) for each in recwarn)


@pytest.mark.parametrize(
    ("accelerator", "device", "refused"),
    [("cpu", "cuda", True), ("auto", "cpu", True), ("auto", "cuda", False), ("gpu", "cuda", False)],
)
def test_float16_is_refused_where_the_cpu_computes(
    accelerator: str, device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "best_device", lambda: torch.device(device))
    if not refused:
        EncodingSettings(precision="16-mixed", accelerator=accelerator)
        return
    with pytest.raises(InputError, match="--precision 16-mixed: needs a GPU; on a CPU use 32-true"):
        EncodingSettings(precision="16-mixed", accelerator=accelerator)


def test_float32_leaves_a_trainers_autocast_as_it_is() -> None:
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16), autocast(cpu, "32-true"):
        assert torch.is_autocast_enabled("cpu")
    with autocast(cpu, "bf16-mixed"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("cores", "devices", "expected"), [(1, 1, 0), (4, 1, 3), (16, 1, 8), (16, 4, 3), (64, -1, 8), (2, 8, 0)]
)
def test_workers_share_the_cores_by_default(
    cores: int, devices: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_clip.tools.workers.usable_cores", lambda: cores)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert EncodingSettings(devices=devices).workers == expected
    assert EncodingSettings(devices=devices, num_workers=5).workers == 5
