"""``lit-clip demo``: the command's page, its API, and what neither gives away (extra ``demo``; ``make test-demo``)."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.commands.demo import LONGEST_PROMPT, SHOWN, Trial, demo
from lit_clip.commands.search import Searched
from lit_clip.embedding.index import INDEX
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import imagenet_templates
from lit_clip.heads import head_from_images
from tests.helpers.demo import get

Drawings = tuple[Path, Path, list[str]]


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^demo needs gradio: pip install 'lit-clip\[demo\]'$"):
        demo(model="last.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "a.npz"}, "--index a.npz: belongs to --images"),
        ({"images": "photos", "index": "a"}, "--index a: must be a .npz file"),
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"head": "a.safetensors"}, "a.safetensors: no such head file"),
        ({"port": 70_000}, "--port 70000: must be from 0 to 65535"),
        ({"port": "taken"}, "cannot listen there (Address already in use); set another"),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_opened(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if options.get("port") == "taken":
            options = {"port": taken.getsockname()[1]}
        with pytest.raises(InputError) as caught:
            demo(model="nowhere.ckpt", **options)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def trial(drawings: Drawings) -> Trial:
    checkpoint, folder, names = drawings
    model = load_model(checkpoint)
    files = [folder / f"{name.replace('/', '_')}.png" for name in names]
    return Trial(model, Searched([file.name for file in files], model.encode(files).numpy(), files))


def test_probabilities_are_those_of_classify(
    trial: Trial, drawings: Drawings, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder, _ = drawings
    names, templates = ["pizza", "tiger", "ice  cream"], ["a photo of a {}.", "a drawing of a {}."]
    words = ["--model", str(checkpoint), "--num_workers", "0", "--output", "json"]
    image = str(folder / "pizza.png")
    run_command(["classify", image, *words, "--classes", *names, "--templates", *templates])
    (expected,) = json.loads(capsys.readouterr().out)
    found = trial.classify(image, "pizza, tiger,\nice cream, pizza,", "\n".join(templates))
    assert list(found) == ["pizza", "tiger", "ice cream"]
    assert found == pytest.approx({each["class"]: each["probability"] for each in expected["classes"]}, abs=2e-6)
    eighty = trial.classify(image, "pizza, tiger", "\n".join(imagenet_templates()))
    assert trial.classify(image, "pizza, tiger", " imagenet\n") == eighty


def test_a_heads_classes_have_the_probabilities_of_the_model_with_it(trial: Trial, drawings: Drawings) -> None:
    files = [str(path) for path in sorted(drawings[1].iterdir())[:6]]
    head = head_from_images(trial.model, files, [0, 1, 2] * 2, ["one", "two", "three"])
    found = Trial(trial.model, headed=head.on(trial.model)).own_classes(files[0])
    expected = trial.model.with_head(head).classify(files[:1])[0].tolist()
    assert found == pytest.approx(dict(zip(["one", "two", "three"], expected, strict=True)), abs=1e-6)


def test_texts_are_found_in_an_image_as_by_locate(
    trial: Trial,
    drawings: Drawings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, folder, _ = drawings
    monkeypatch.chdir(tmp_path)
    for name in ("pizza", "tiger"):
        shutil.copy(folder / f"{name}.png", tmp_path)
    run_command(["locate", "pizza.png", "pizza", "tiger", "--model", str(checkpoint), "--output", "found"])
    rows = json.loads((tmp_path / "found/locations.json").read_text())
    shown = trial.locate(str(folder / "pizza.png"), "pizza\n\n tiger \npizza", " \n")
    for (image, caption), row in zip(shown, rows, strict=True):
        number = f"{row['cosine']:.3f}"
        seen = f"{number}, {row['margin']:+.3f}" if row["seen"] else f"not seen ({number})"
        assert caption == f"{row['text']}: {seen}"
        with Image.open(tmp_path / "found" / row["overlay"]) as written:
            assert image.tobytes() == written.tobytes()
    few = "\n".join(f"a {number}" for number in range(19))
    assert trial.locate("tiger.png", "tiger", few)[0][1] != trial.locate("tiger.png", "tiger", "")[0][1]


@pytest.mark.parametrize(
    ("image", "texts", "background", "message"),
    [
        (None, "a", "", "no image: drop one"),
        ("pizza.png", " \n", "", "nothing to find: type a text a line"),
        ("pizza.png", "\n".join(map(str, range(21))), "", "texts: 21; at most 20"),
        ("pizza.png", "a", "b" * (LONGEST_PROMPT + 1), "a text of 1,001 characters; at most 1,000"),
        ("pizza.png", "a", "b\nc", "background: 2 texts, and false alarms of 0.05 need at least 19"),
        ("pizza.png", "a", "\n".join(map(str, range(10_001))), "background: 10,001 texts; at most 10,000"),
    ],
)
def test_mistakes_about_where_are_said_on_the_page(
    image: str | None, texts: str, background: str, message: str, trial: Trial, drawings: Drawings
) -> None:
    with pytest.raises(InputError) as caught:
        trial.locate(image and str(drawings[1] / image), texts, background)
    assert message in str(caught.value)


def test_a_name_finds_its_drawing_and_images_found_are_small(trial: Trial, tmp_path: Path) -> None:
    found = trial.search("tiger", 3)
    assert len(found) == 3
    assert re.fullmatch(r"0\.\d{3} tiger\.png", found[0][1])
    large = tmp_path / "large.png"
    Image.new("RGBA", (2048, 128)).save(large)
    features = trial.model.encode([large]).numpy()
    gone = Searched(["large", "gone"], features.repeat(2, 0), [large, tmp_path / "gone.png"])
    ((image, _),) = Trial(trial.model, gone).search("tiger", 10)
    assert image.size == (SHOWN, SHOWN // 16)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_typed_never_opens_a_file(trial: Trial, drawings: Drawings, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("secret\nwords\n")
    assert [*trial.classify(str(drawings[1] / "pizza.png"), f"{tmp_path}/names.txt, tiger", "{}")] == [
        f"{tmp_path}/names.txt",
        "tiger",
    ]
    image = str(drawings[1] / "pizza.png")  # as an image, it would find itself
    assert not trial.search(image, 1)[0][1].startswith("1.000")


@pytest.mark.parametrize(
    ("image", "names", "templates", "message"),
    [
        (None, "a, b", "{}", "no image: drop one"),
        ("words.png", "a, b", "{}", "the image: cannot read"),
        ("pizza.png", "a, a ,", "{}", "class names: 1; type at least 2"),
        ("pizza.png", "a, b", "a photo", "prompt templates: 'a photo' has no {}"),
        ("pizza.png", "a, b", " \n", "prompt templates: empty"),
        ("pizza.png", ",".join(map(str, range(200))), "imagenet", "16,000 prompts; at most 10,000"),
        ("pizza.png", "a, " + "b" * LONGEST_PROMPT, "{}", "a prompt of 1,002 characters; at most 1,000"),
        ("pizza.png", "a, bbbbbbbbbb", "{}" * 99, "a prompt of 1,188 characters; at most 1,000"),
    ],
)
def test_mistakes_on_the_page_are_said_there(
    image: str | None, names: str, templates: str, message: str, trial: Trial, drawings: Drawings, tmp_path: Path
) -> None:
    shutil.copy(drawings[1] / "pizza.png", tmp_path)
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(InputError) as caught:
        trial.classify(image and str(tmp_path / image), names, templates)
    assert message in str(caught.value)
    with pytest.raises(InputError, match="nothing to search for"):
        trial.search(" ", 3)
    with pytest.raises(InputError, match="sentence: 1,001 characters; at most 1,000"):
        trial.search("a" * (LONGEST_PROMPT + 1), 3)


# The command, in a process of its own -----------------------------------------------------------------------------


def test_the_api_searches_classifies_and_locates(served: tuple[int, Path], trial: Trial) -> None:
    from gradio_client import Client, handle_file

    port, folder = served
    client = Client(f"http://127.0.0.1:{port}", verbose=False)
    found = client.predict("tiger", 3, api_name="/search")
    assert [each["caption"] for each in found] == [caption for _, caption in trial.search("tiger", 3)]
    with Image.open(found[0]["image"]) as image:
        assert image.size == (72, 72)
    label = client.predict(handle_file(folder / "pizza.png"), "pizza, tiger", "{}", api_name="/classify")
    assert label["label"] == "pizza"
    assert any(folder.parent.glob("lit-clip-demo-*/*/pizza.png"))  # until the demo ends
    expected = trial.classify(str(folder / "pizza.png"), "pizza, tiger", "{}")
    assert {each["label"]: each["confidence"] for each in label["confidences"]} == pytest.approx(expected, abs=1e-5)
    found = client.predict(handle_file(folder / "pizza.png"), "pizza\ntiger", "", api_name="/locate")
    shown = trial.locate(str(folder / "pizza.png"), "pizza\ntiger", "")
    assert [each["caption"] for each in found] == [caption for _, caption in shown]
    with pytest.raises(Exception, match="type at least 2"):
        client.predict(handle_file(folder / "pizza.png"), "pizza", "{}", api_name="/classify")


def test_no_file_of_this_machine_is_served(served: tuple[int, Path]) -> None:
    port, folder = served
    here = Path(__file__)
    for path in (folder / "notes.txt", folder / INDEX, folder / "pizza.png", here, here.parent / "../conftest.py"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", ""):
            status, body, _ = get(port, f"/{route}{path}")
            assert status in (403, 404), (route, path)
            assert b"a secret" not in body


def test_the_page_belongs_to_this_machine_and_fetches_nothing_elsewhere(served: tuple[int, Path]) -> None:
    port, _ = served
    status, _, headers = get(port, "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]  # versions of gradio load a script from elsewhere


def test_a_browser_shows_the_page_in_the_width_of_a_phone(served: tuple[int, Path], tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900", "--virtual-time-budget=20000"]
    options += ["--dump-dom", f"--user-data-dir={tmp_path}"]
    url = f"http://127.0.0.1:{served[0]}/"
    done = subprocess.run([chromium, *options, url], capture_output=True, text=True, timeout=120, check=False)
    assert all(word in done.stdout for word in ("64 images", "Sentence", "Class names", "Prompt templates")), (
        done.stderr
    )
