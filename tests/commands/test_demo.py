"""``lit-clip demo``: the command's page, its API, and what neither gives away (extra ``demo``; ``make test-demo``)."""

import base64
import io
import json
import re
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.commands.class_heads import HeadFile
from lit_clip.commands.demo import demo, shown_below
from lit_clip.commands.demo_locate import Tab
from lit_clip.commands.demo_trial import LONGEST_PROMPT, SHOWN, Trial
from lit_clip.commands.search import Searched, read_searched
from lit_clip.embedding.index import nearest
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import imagenet_templates
from lit_clip.heads import head_from_images
from tests.helpers.chromium import Page, chromium_page
from tests.helpers.demo import get, post

Drawings = tuple[Path, Path, list[str]]


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(InputError, match="^demo needs uvicorn: pip install uvicorn$"):
        demo(model="last.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "a.npz"}, "--index a.npz: belongs to --images"),
        ({"images": "photos", "index": "a"}, "--index a: must be a .npz file"),
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"head": HeadFile("a.safetensors")}, "a.safetensors: there is no such file; classify"),
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
    features = model.encode(files).numpy()
    return Trial(model, Searched([file.name for file in files], partial(nearest, features), files))


def test_probabilities_are_those_of_classify(
    trial: Trial, drawings: Drawings, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder, _ = drawings
    names, templates = ["pizza", "tiger", "ice  cream"], ["a photo of a {}.", "a drawing of a {}."]
    words = ["--model", str(checkpoint), "--num_workers", "0", "--output", "json"]
    image = folder / "pizza.png"
    run_command(["classify", str(image), *words, "--classes", *names, "--templates", *templates])
    (expected,) = json.loads(capsys.readouterr().out)
    found = trial.classify(image, "pizza, tiger,\nice cream, pizza,", "\n".join(templates))
    assert list(found) == ["pizza", "tiger", "ice cream"]
    assert found == pytest.approx({each["class"]: each["probability"] for each in expected["classes"]}, abs=2e-6)
    eighty = trial.classify(image, "pizza, tiger", "\n".join(imagenet_templates()))
    assert trial.classify(image, "pizza, tiger", " imagenet\n") == eighty


def test_a_heads_classes_have_the_probabilities_of_the_model_with_it(trial: Trial, drawings: Drawings) -> None:
    files = sorted(drawings[1].iterdir())[:6]
    head = head_from_images(trial.model, [str(file) for file in files], [0, 1, 2] * 2, ["one", "two", "three"])
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
    shown = Tab(trial.model)(folder / "pizza.png", "pizza\n\n tiger \npizza", " \n")
    for (image, caption), row in zip(shown, rows, strict=True):
        number = f"{row['cosine']:.3f}"
        seen = f"{number}, {row['margin']:+.3f}" if row["seen"] else f"not seen ({number})"
        assert caption == f"{row['text']}: {seen}"
        with Image.open(tmp_path / "found" / row["overlay"]) as written:
            assert image.tobytes() == written.tobytes()
    few = "\n".join(f"a {number}" for number in range(19))
    assert Tab(trial.model)(Path("tiger.png"), "tiger", few)[0][1] != Tab(trial.model)(Path("tiger.png"), "tiger")[0][1]


def test_of_a_file_of_features_those_images_are_shown_that_lie_below_its_folder(
    trial: Trial, drawings: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder, _ = drawings
    monkeypatch.chdir(tmp_path)
    Path("own/photos").mkdir(parents=True)
    shutil.copy(folder / "pizza.png", "own/photos")
    for name in ("elsewhere.png", "other.png"):
        shutil.copy(folder / "pizza.png", name)
    rows = ["own/photos/pizza.png", "own/../elsewhere.png", str(tmp_path / "other.png"), str(folder / "tiger.png")]
    run_command(["embed", *rows, "--model", str(checkpoint), "--output", "own/all.npy", "--num_workers", "0"])
    searched = shown_below(Path("own"), read_searched(Path("own/all.npy"), trial.model))
    assert sorted(searched.names) == sorted(rows)
    shown = Trial(trial.model, searched).search("pizza")
    assert [caption.split(maxsplit=1)[1] for _, caption in shown] == ["own/photos/pizza.png"]


def test_a_name_finds_its_drawing_and_images_found_are_small(trial: Trial, tmp_path: Path) -> None:
    found = trial.search("tiger", 3)
    assert len(found) == 3
    assert re.fullmatch(r"0\.\d{3} tiger\.png", found[0][1])
    large = tmp_path / "large.png"
    Image.new("RGBA", (2048, 128)).save(large)
    features = trial.model.encode([large]).numpy()
    gone = Searched(["large", "gone"], partial(nearest, features.repeat(2, 0)), [large, tmp_path / "gone.png"])
    ((image, _),) = Trial(trial.model, gone).search("tiger", 10)
    assert image.size == (SHOWN, SHOWN // 16)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_typed_never_opens_a_file(trial: Trial, drawings: Drawings, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("secret\nwords\n")
    assert [*trial.classify(drawings[1] / "pizza.png", f"{tmp_path}/names.txt, tiger", "{}")] == [
        f"{tmp_path}/names.txt",
        "tiger",
    ]
    image = str(drawings[1] / "pizza.png")  # as an image, it would find itself
    assert not trial.search(image, 1)[0][1].startswith("1.000")


@pytest.mark.parametrize(
    ("ask", "image", "words", "message"),
    [
        ("classify", None, ("a, b", "{}"), "no image: drop one"),
        ("classify", "words.png", ("a, b", "{}"), "the image: cannot read"),
        ("classify", "pizza.png", ("a, a ,", "{}"), "class names: 1; type at least 2"),
        ("classify", "pizza.png", ("a, b", "a photo"), "prompt templates: 'a photo' has no {}"),
        ("classify", "pizza.png", ("a, b", " \n"), "prompt templates: empty"),
        ("classify", "pizza.png", (",".join(map(str, range(200))), "imagenet"), "16,000 prompts; at most 10,000"),
        ("classify", "pizza.png", ("a, " + "b" * LONGEST_PROMPT, "{}"), "a prompt of 1,002 characters"),
        ("classify", "pizza.png", ("a, bbbbbbbbbb", "{}" * 99), "a prompt of 1,188 characters"),
        ("locate", None, ("a", ""), "no image: drop one"),
        ("locate", "pizza.png", (" \n", ""), "nothing to find: type a text a line"),
        ("locate", "pizza.png", ("\n".join(map(str, range(21))), ""), "texts: 21; at most 20"),
        ("locate", "pizza.png", ("a", "b" * (LONGEST_PROMPT + 1)), "a text of 1,001 characters; at most 1,000"),
        ("locate", "pizza.png", ("a", "b\nc"), "background: 2 texts, and false alarms of 0.05 need at least 19"),
        ("locate", "pizza.png", ("a", "\n".join(map(str, range(10_001)))), "background: 10,001 texts"),
        ("search", None, (" ", "3"), "nothing to search for"),
        ("search", None, ("a" * (LONGEST_PROMPT + 1), "3"), "sentence: 1,001 characters; at most 1,000"),
        *(
            ("search", None, ("tiger", count), "must be a number from 1 to 200")
            for count in ("", "0", "-5", "0.5", "201")
        ),
        ("search", None, ("tiger", "9" * 9999), "must be a number from 1 to 200"),
    ],
)
def test_mistakes_on_the_page_are_said_there(
    ask: str, image: str | None, words: tuple[str, str], message: str, trial: Trial, drawings: Drawings, tmp_path: Path
) -> None:
    shutil.copy(drawings[1] / "pizza.png", tmp_path)
    (tmp_path / "words.png").write_text("no image")
    answers = {"classify": trial.classify, "locate": Tab(trial.model), "search": trial.search}
    with pytest.raises(InputError) as caught:
        answers[ask](*([] if ask == "search" else [tmp_path / image if image else None]), *words)
    assert message in str(caught.value)


# The command, in a process of its own -----------------------------------------------------------------------------


def test_the_page_searches_classifies_and_locates_by_http(served: tuple[int, Path], trial: Trial) -> None:
    port, folder = served
    pizza = folder / "pizza.png"
    status, found = post(port, "search", {"text": "tiger", "count": 3})
    assert status == 200
    assert [each["caption"] for each in found] == [caption for _, caption in trial.search("tiger", 3)]
    kind, _, data = found[0]["image"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (72, 72)
    _, found = post(port, "classify", {"image": pizza.read_bytes(), "names": "pizza, tiger", "templates": "{}"})
    assert found == pytest.approx(trial.classify(pizza, "pizza, tiger", "{}"), abs=1e-5)
    _, found = post(port, "locate", {"image": pizza.read_bytes(), "texts": "pizza\ntiger", "background": ""})
    assert [each["caption"] for each in found] == [caption for _, caption in Tab(trial.model)(pizza, "pizza\ntiger")]
    assert [*post(port, "own_classes", {"image": pizza.read_bytes()})[1]] == ["one", "two", "three"]
    for path in ("own_classes", "classify", "locate"):
        assert post(port, path, {"names": "a, b"}) == (400, {"detail": "no image: drop one, or click to choose a file"})
    status, found = post(port, "classify", {"image": pizza.read_bytes(), "names": "pizza"})
    assert status == 400
    assert "type at least 2" in found["detail"]


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, served: tuple[int, Path]) -> Iterator[Page]:
    """The page in Chromium, at the width of a desktop's window or of a phone."""
    with chromium_page(f"http://127.0.0.1:{served[0]}/", *request.param) as page:
        yield page


def test_a_browser_shows_what_the_model_answers(page: Page, served: tuple[int, Path], trial: Trial) -> None:
    pizza = served[1] / "pizza.png"
    assert page.value("document.querySelector('.muted').textContent").endswith(" M parameters, 64 images")
    assert page.value("[...document.querySelectorAll('nav button')].map((each) => each.textContent)") == [
        *("Search", "Own classes", "Classify", "Where")
    ]
    page.type("#search textarea", "tiger")
    page.click("#search button")
    page.wait_for("document.querySelectorAll('#search figure').length === 12")
    captions = page.value("[...document.querySelectorAll('#search figcaption')].map((each) => each.textContent)")
    assert captions == [caption for _, caption in trial.search("tiger", 12)]
    page.click("nav button:nth-child(3)")
    page.type("#classify textarea", "pizza, <b>tiger</b>")
    page.choose("#classify input", pizza)  # is enough: the names were typed before
    page.wait_for("document.querySelectorAll('#classify .class').length === 2")
    shown = page.value("[...document.querySelectorAll('#classify .class > div')].map((each) => each.innerText)")
    expected = trial.classify(pizza, "pizza, <b>tiger</b>")
    assert {line.split("\n")[0]: float(line.split("\n")[1].split()[0]) for line in shown} == pytest.approx(
        {name: 100 * probability for name, probability in expected.items()}, abs=0.06
    )
    assert page.value("document.querySelector('#classify .drop img').naturalWidth") == 72
    page.type("#classify textarea", "pizza")
    page.click("#classify .asked > button")
    page.wait_for("document.querySelector('#classify .wrong').textContent.includes('type at least 2')")
    page.click("nav button:nth-child(2)")
    page.choose("#own_classes input", pizza)
    page.wait_for("document.querySelectorAll('#own_classes .class').length === 3")
    page.click("nav button:nth-child(4)")
    page.type("#locate textarea", "pizza\ntiger")
    page.choose("#locate input", pizza)
    page.wait_for("document.querySelectorAll('#locate figure img').length === 2")
    page.wait_for("[...document.querySelectorAll('#locate figure img')].every((each) => each.naturalWidth >= 256)")


def test_every_tab_has_room_in_the_window_and_nothing_is_refused_by_the_browser(page: Page) -> None:
    for number in range(1, 5):
        page.click(f"nav button:nth-child({number})")
        assert page.value("[...document.forms].filter((each) => each.offsetHeight > 0).length") == 1
        assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.complaints() == []


def test_what_is_loaded_comes_from_this_machine_and_is_shown_in_no_other_page(served: tuple[int, Path]) -> None:
    port, _ = served
    status, body, headers = get(port, "/")
    assert status == 200
    assert re.findall(rb'(?:src|href)="([^"]*)"', body) == [b"/demo.js"]
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "'unsafe-inline'" not in policy.replace("style-src 'unsafe-inline'", "")
