"""``lit-clip classify`` on class folders says how good it is; thresholds are fitted on examples."""

import csv
import html
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, roc_auc_score

from lit_clip import zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.commands.class_examples import folder_truth
from lit_clip.commands.class_sources import class_probabilities
from lit_clip.commands.classify import read_classes
from lit_clip.embedding.image_files import ImageFile
from lit_clip.errors import InputError
from lit_clip.heads import load_head
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import Console
from lit_clip.tools.images import open_image
from tests.helpers.small_sets import NAMES, Shades, make_module

AUROC = "torchmetrics.classification.MulticlassAUROC"
SAVED = ["--save_head", "head.safetensors"]
OPTIONS = ["--model", "last.ckpt", "--templates", "a {} patch.", "--num_workers", "0", "--batch_size", "7"]


def write_folders(root: Path, split: str, size: int = 40, others: int = 0) -> list[tuple[str, int]]:
    """Write :class:`Shades` into folders by class, and some into a folder of no class; return paths and labels."""
    images, found = Shades("", split, size + others), []
    for row, label in enumerate(images.labels()):
        name = NAMES[label] if row < size else "elsewhere"
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        images[row][0].save(folder / f"{row:03}.png")
        found.append((f"{root.name}/{name}/{row:03}.png", label if row < size else -1))
    return sorted(found)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = make_module().model.eval()
    monkeypatch.setattr("lit_clip.commands.classify.load_model", lambda name: model)
    monkeypatch.setattr("lit_clip.heads.examples.DRAWS", 1)  # the curve's fits take half of the time of fitting a head
    monkeypatch.setattr("lit_clip.evaluation.class_head.PENALTIES", (10.0, 0.1))  # of six
    return tmp_path


def scored(found: list[tuple[str, int]], names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and probabilities ``[N, C]`` of image files, all at once."""
    model = make_module().model.eval()
    with torch.no_grad():
        photos = torch.stack([model.preprocess(open_image(Path(path))) for path, _ in found])
        cosine = model.encode_image(photos, normalize=True) @ zero_shot_classifier(model, names, ["a {} patch."])
        return cosine, (model.logit_scale.exp() * cosine).softmax(dim=1)


def classify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[dict[str, object]], str]:
    run_command(["classify", *words, *OPTIONS, "--output", "json"])
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_class_folders_give_accuracy_confusions_metrics_and_a_page(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = write_folders(root / "photos", "test")
    names = sorted(NAMES)  # those of the subfolders
    truth = np.array([names.index(NAMES[label]) for _, label in found])
    each = f"each={{class_path: {AUROC}, init_args: {{average: none}}}}"
    answers, told = classify(capsys, "photos", "--metrics", f"auroc={AUROC}", each)
    _, likely = scored(found, names)
    predicted = likely.argmax(dim=1).numpy()
    assert [answer["image"] for answer in answers] == [path for path, _ in found]
    assert [answer["classes"][0]["class"] for answer in answers] == [names[place] for place in predicted]  # pyright: ignore
    right = int((predicted == truth).sum())
    interval = binomtest(right, 40).proportion_ci(0.995)
    assert (
        f"accuracy: {100 * accuracy_score(truth, predicted):.1f} % of 40 images (99.5 % interval "
        f"{100 * interval.low:.1f} % to {100 * interval.high:.1f} %), mean per class "
        f"{100 * balanced_accuracy_score(truth, predicted):.1f} %"
    ) in told
    auroc = roc_auc_score(
        truth, likely.double().numpy() / likely.double().sum(1, keepdim=True).numpy(), multi_class="ovr"
    )
    assert float(re.search(r"^auroc: (\S+)", told, re.MULTILINE)[1]) == pytest.approx(auroc, abs=1e-4)  # pyright: ignore
    assert [row[0] for row in csv.reader((root / "classify_each.csv").open())] == names
    matrix = confusion_matrix(truth, predicted)
    rows = list(csv.reader((root / "classify_confusions.csv").open()))
    assert rows[0] == ["truth", *names]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=int), matrix)
    page = (root / "classify.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == page.count("data:image/jpeg") == 40 - right
    for (path, _), place, label, values in zip(found, predicted, truth, likely, strict=True):
        assert (f"<small>{path}</small>" in page) == (place != label)
        if place != label:
            figure = next(part for part in page.split("<figure>") if path in part)
            shown = re.findall(r"\((\S+ %)\)", html.unescape(figure))
            assert shown == [f"{100 * values[label]:.1f} %", f"{100 * values[place]:.1f} %"]
    first = next(part for part in page.split("<figure>")[1:])
    wrong = [
        float(values.max()) for values, place, label in zip(likely, predicted, truth, strict=True) if place != label
    ]
    assert f"({100 * max(wrong):.1f} %)" in first  # the most confidently wrong image


def test_typed_classes_are_found_in_the_names_of_folders() -> None:
    names = ["ice cream", "T-shirt", "food"]
    paths = ["a/ice_cream/1.png", "a/Ice-Cream/2020/1.png", "a/t shirt/1.png", "a/food/ice cream/1.png", "a/b/food.png"]
    paths += ["food/b/1.png", "food/b/c/1.png", "b/food/2.png"]
    files = [ImageFile(path, Path(path)) for path in paths]
    # The innermost folder counts, and none above the folders that were typed.
    assert folder_truth(files, names, [Path("a"), Path("food/b")]) == [0, 0, 1, 0, -1, -1, -1, 2]
    assert folder_truth(files, names, [Path("food")])[5:] == [2, 2, 2]
    assert folder_truth(files, names, [Path()])[5:] == [2, 2, 2]


def test_class_names_are_typed_as_words_or_as_a_list() -> None:
    for words in (["[ice cream, t-shirt]"], ["[ice", "cream,", "t-shirt]"], ["['ice cream', \"t-shirt\"]"]):
        assert read_classes(words) == ["ice cream", "t-shirt"]
    assert read_classes(["ice cream,t-shirt"]) == read_classes(["ice cream", "t-shirt"]) == ["ice cream", "t-shirt"]
    assert read_classes(["[small] cat", "dog"]) == ["[small] cat", "dog"]
    assert read_classes(["[a]", "[b]"]) == ["[a]", "[b]"]
    for words in (["(red,blue)"], ["[red,blue]", "green"]):
        with pytest.raises(InputError, match="its brackets hold no list here"):
            read_classes(words)


def test_scores_have_the_precision_that_is_asked_for_and_hold_no_graph_of_the_model(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folders(root / "photos", "test", 7)
    found: list[torch.Tensor] = []

    def keep(model: CLIP, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        probability = class_probabilities(model, features, weights)
        assert not probability.requires_grad
        found.append(features)
        return probability

    monkeypatch.setattr("lit_clip.commands.class_sources.class_probabilities", keep)
    for precision in ("32-true", "bf16-mixed"):
        classify(capsys, "photos", "--precision", precision)
    exact, half = found
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


def test_copies_with_one_class_are_examples(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(root / "examples", "train", 14)
    for each in list((root / "examples").rglob("*.png"))[:3]:
        shutil.copy(each, each.with_stem(f"{each.stem}_copy"))
    _, told = classify(capsys, "examples", "--examples", "examples")
    assert "fitted on 17 examples" in told


def test_images_of_no_class_are_not_counted_and_flat_folders_are_not_judged(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folders(root / "photos", "test", 20, others=5)
    _, told = classify(capsys, "photos", "--classes", *NAMES)
    assert "of 20 images" in told
    assert "not counted: 5 images, in no folder that is named like a class" in told
    (root / "classify.html").unlink()
    _, told = classify(capsys, "photos/elsewhere", "--classes", *NAMES)
    assert "accuracy" not in told
    assert not (root / "classify.html").exists()


TABLES = {
    "a.csv": "image,label\nx.png,red\n",
    "b.csv": "image,classes\nphotos/red/000.png,red; blue\nphotos/red/000.png,violet\n",
    "c.csv": "image,classes\n",
    "d.csv": f"image,classes\n{'x' * 200_000},red\n",
    "e.csv": "image,classes\n,red\n",
    "f.csv": "image,classes\nf.png,red\n",
    "g.csv": "image,classes\nphotos/red/000.png,red\nphotos/red/000.png,blue\n",
    "h.csv": "image,classes\nBLUE,blue,\ncopy.png,red,blue\n",
    "i.csv": "image,classes\nBLUE,blue\ncopy.png,red\n",
    "j.csv": "image,classes\nBLUE,blue\ncopy.png,None of these\n",
    "k.csv": "",
    "l.csv": "image,classes,image\nBLUE,blue,copy.png\n",
    "t.xlsx": "PK",
    "n.json": '["red", "blue"]',
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("photos/elsewhere", "--classes: not given, and photos/elsewhere is no folder with a subfolder"),
        ("fotos --classes red blue", r"fotos: no such file or folder; did you mean photos\?"),
        ("above", "--classes: not given, and above has one subfolder, photos"),
        ("photos/elsewhere --classes red blue --metrics a=x.Y", "--metrics: no image is in a folder"),
        ("photos --metrics torchmetrics.Accuracy", "must be NAME=CLASS_PATH"),
        ("photos --metrics a=torchmetrics.classification.MulticlassAUROCK", "metrics: a: .*did you mean"),
        ("photos/elsewhere --classes red blue --sheet x.html", "--sheet: no image is in a folder"),
        ("photos --classes n.json", "--classes n.json: write a text file, n.txt"),
        ("photos --sheet no/x.html", "--sheet no/x.html: there is no such folder"),
        ("photos --examples none", "none: no such folder"),
        ("photos --classes a b --examples photos", "no folder there is named like a class"),
        ("photos --examples photos --none_error 1", "--none_error 1.0: must be above 0"),
        ("photos --examples photos --head h.safetensors", "--head: was fitted already"),
        ("photos --classes a b --head h.safetensors", "--classes: a head has its own"),
        ("photos --head h.safetensors", "h.safetensors: there is no such file; classify --save_head"),
        ("photos --save_head h.safetensors", "--save_head: needs --examples"),
        ("photos --label_next 3", "--label_next: needs --examples"),
        ("photos --none_error 0.2 --classes red blue", "--none_error: needs --examples"),
        ("photos --examples photos --label_next 0", "--label_next 0: must be at least 1"),
        ("photos --examples photos --save_head h.pt", "--save_head h.pt: must be a .safetensors file"),
        ("photos --examples g.csv", "g.csv: line 3: photos/red/000.png is there twice"),
        ("photos --examples k.csv", "k.csv: has no column image and classes; there are none"),
        ("photos --examples a.csv", "a.csv: has no column classes; there are image, label"),
        ("photos --classes red blue --examples b.csv", "b.csv: line 3: violet is not among --classes"),
        ("photos --examples c.csv", "c.csv: the table is empty"),
        ("photos --examples h.csv", "h.csv: line 3: more cells than .* put ; between"),
        ("photos --examples i.csv", "i.csv: photos/blue/.*copy.png are the same image"),
        ("photos --examples l.csv", "l.csv: two columns have the same name"),
        ("photos --examples j.csv", "j.csv: a class may not be called none of these"),
        ("photos --examples t.xlsx", "t.xlsx: must be a folder of class folders, or a .csv"),
        ("photos --examples d.csv", "d.csv: not a readable table .field larger than field limit"),
        ("photos --examples e.csv", "e.csv: line 2: names no image"),
        ("photos --classes red blue --examples f.csv --on_error skip", "none of 1 images could be read"),
        ("photos --classes red blue --examples f.csv", "f.png: no such image file"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str, root: Path) -> None:
    write_folders(root / "photos", "test", 7, others=2)
    write_folders(root / "above/photos", "test", 1)
    blue = next((root / "photos/blue").iterdir()).relative_to(root)
    shutil.copy(blue, "copy.png")
    for name, text in TABLES.items():
        (root / name).write_text(text.replace("BLUE", str(blue)))
    csv.field_size_limit(131_072)  # Python's: other rooms raise it for the whole process
    with pytest.raises(InputError, match=message) as error:
        run_command(["classify", *words.split(), *OPTIONS])
    assert "\n" not in str(error.value)


def test_examples_give_a_head_and_its_file_classifies_alike(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_folders(root / "examples", "train", 42, others=20)
    photos = write_folders(root / "photos", "test", 40, others=20)
    words = ["photos", "--classes", *NAMES, "--examples", "examples", "--none_error", "0.1"]
    answers, told = classify(capsys, *words, "--save_head", "head.safetensors")
    head, model = load_head("head.safetensors"), make_module().model.eval()
    with torch.no_grad():
        likely = model.with_head(head).classify([path for path, _ in photos])
        of_photos, of_examples = (
            head(*features_of([path for path, _ in found], model)).amax(dim=1) for found in (photos, examples)
        )
    assert head.facts.none is not None
    none = of_photos < head.facts.none
    assert 0 < none.sum() < len(none)
    for answer, is_none, row in zip(answers, none.tolist(), likely, strict=True):
        classes = answer["classes"]
        assert (classes[0] == {"class": "none of these", "probability": None}) == is_none  # pyright: ignore
        best = classes[int(is_none)]  # pyright: ignore
        assert best["class"] == NAMES[int(row.argmax())]
        assert best["probability"] == pytest.approx(float(row.max()), abs=1e-5)
    known = torch.tensor([label >= 0 for _, label in examples])
    assert "head of 7 classes, fitted on 42 examples: " in told
    rejected = float((of_examples[~known] < head.facts.none).double().mean())
    assert f"of 20 examples of no class {100 * rejected:.1f} % are called so" in told
    truth = torch.tensor([label for _, label in photos])
    right = (likely.argmax(dim=1) == truth) & ~none
    accuracy = float(right[truth >= 0].double().mean())
    assert f"accuracy: {100 * accuracy:.1f} % of 40 images" in told
    assert accuracy > (scored(photos, NAMES)[1].argmax(dim=1) == truth)[truth >= 0].double().mean()
    with pytest.raises(InputError, match=r"--templates: head.safetensors was fitted with its own"):
        run_command(["classify", "photos", "--head", "head.safetensors", *OPTIONS, "--templates", "an image of a {}."])
    again, told = classify(capsys, "photos", "--head", "head.safetensors")
    assert again == answers
    assert "fitted on" not in told
    assert f"none of these: {int(none.sum())} of 60 images" in told
    run_command(["classify", "photos", "--head", "head.safetensors", "--output", "csv", *OPTIONS])
    output = capsys.readouterr()
    assert output.out.count("none of these") == int(none.sum())
    assert f"none of these: {int(none.sum())} of 60 images" in output.err
    _, told = classify(capsys, *words)  # the features of the examples are kept
    assert "index" not in told


def features_of(paths: list[str], model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.stack([model.preprocess(open_image(Path(path))) for path in paths])
    before, after = model.image_features(pixels)
    return before, torch.nn.functional.normalize(after, dim=1)


def test_a_head_of_another_model_is_refused_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(root / "examples", "train", 14)
    run_command(["classify", "examples", "--examples", "examples", "--save_head", "head.safetensors", *OPTIONS])
    other = make_module(text_width=32).model.eval()
    monkeypatch.setattr("lit_clip.commands.classify.load_model", lambda name: other)
    with pytest.raises(InputError, match="--head head.safetensors: fitted on the features of another model") as error:
        run_command(["classify", "examples", "--head", "head.safetensors", *OPTIONS])
    assert "\n" not in str(error.value)


def test_what_is_labelled_next_becomes_examples(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(root / "examples", "train", 14)
    photos = write_folders(root / "photos", "test", 30)
    shutil.copy(photos[0][0], root / "examples" / "loose.png")  # in no class's folder
    _, told = classify(capsys, "photos", "--examples", "examples", "--label_next", "12")
    assert f"head of {len(NAMES)} classes, fitted on 14 examples" in told
    rows = list(csv.DictReader(io.StringIO((root / "label_next.csv").read_text())))
    assert len({row["image"] for row in rows}) == 12
    assert all((root / row["image"]).is_file() for row in rows)
    assert {row["classes"] for row in rows} <= set(NAMES)
    assert (root / "label_next.html").read_text().count("data:image/jpeg") == 12
    names = list(dict.fromkeys(row["classes"] for row in rows))
    answers, _ = classify(capsys, "photos", "--examples", "label_next.csv")
    assert {each["class"] for each in answers[0]["classes"]} <= {*names, "none of these"}  # pyright: ignore
    lines = ["image,classes"]
    for number, row in enumerate(rows):  # names that a spreadsheet would compute have an apostrophe in our tables
        Path(row["image"]).rename(f"={number}.png")
        lines.append(f"'={number}.png,{row['classes']}")
    Path("formulas.csv").write_text("\n".join(lines))
    rest, _ = classify(capsys, "photos", "--examples", "formulas.csv")
    assert rest == [each for each in answers if Path(str(each["image"])).is_file()]


def test_a_few_rows_of_class_folders_stand_above_all_summaries(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(root / "examples", "train", 28)
    found = write_folders(root / "photos", "test", 40)
    monkeypatch.setattr("lit_clip.commands.class_output.Console", lambda: Console(file=sys.stderr, width=100))
    fitted = ["--classes", *NAMES, "--examples", "examples", *SAVED]
    all_rows = ["--head", SAVED[1], "--output", "table"]
    for more, shown, summary in ((fitted, 20, "none of these: a logit below"), (all_rows, 40, "none of these: ")):
        run_command(["classify", "photos", *more, *OPTIONS])
        told = capfd.readouterr().err
        places = [told.index(f" {path} ") for path, _ in found[:shown]]
        assert sum(path in told.partition("accuracy: ")[0] for path, _ in found) == shown
        assert max(places) < told.rindex(summary, 0, told.index("accuracy: "))
        assert ("the first 20 of 40 images; --output table shows all" in told) == (shown == 20)


def test_a_files_name_says_its_format(root: Path) -> None:
    write_folders(root / "photos", "test", 4)
    words = ["classify", "photos", "--classes", *NAMES, *OPTIONS]
    for name, more in (("a.csv", []), ("a.json", []), ("b.txt", ["--output", "csv"])):
        run_command([*words, "--output_file", name, *more])
    rows = csv.DictReader(Path("a.csv").read_text().splitlines())
    assert {row["image"] for row in rows} == {row["image"] for row in json.loads(Path("a.json").read_text())}
    assert Path("b.txt").read_text() == Path("a.csv").read_text()


def test_several_classes_an_image_are_those_above_their_thresholds(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = write_folders(root / "examples", "train", 60)
    photos = write_folders(root / "photos", "test", 20)
    lines = ["image\tclasses"]
    for path, label in examples:
        shown = {label} | ({6} if label == 5 else set())  # grey images are also white
        lines.append(f"{path}\t{'; '.join(NAMES[place].upper() for place in sorted(shown))}")
    (root / "examples.tsv").write_text("\n".join(lines))
    answers, told = classify(capsys, "photos", "--classes", *NAMES, "--examples", "examples.tsv", *SAVED)
    head, model = load_head("head.safetensors"), make_module().model.eval()
    assert head.facts.several
    likely = model.with_head(head).classify([path for path, _ in photos])
    for answer, values in zip(answers, likely, strict=True):
        above = {NAMES[c] for c in range(7) if values[c] >= head.thresholds[c]}
        assert {each["class"] for each in answer["classes"]} == (above or {"none of these"})  # pyright: ignore
    truth = torch.tensor([label for _, label in photos])
    assert (likely >= head.thresholds)[torch.arange(20), truth].double().mean() > 0.6
    assert "% on held-out examples (5 folds), " in told


GROUPS = {"hue": ["red", "green", "blue"], "shade": ["dark", "pale"]}


def write_groups(root: Path, found: list[tuple[str, int]], name: str) -> list[list[int]]:
    """Write ``groups.yaml`` and a table of the images' classes by group; return them, -1 for an empty cell."""
    (root / "groups.yaml").write_text("hue: [red, green, blue]\nshade: [dark, pale]\n")
    lines, labels = ["image,shade,hue"], [[label if label < 3 else -1, int(label > 2)] for _, label in found]
    for (path, _), (hue, shade) in zip(found, labels, strict=True):
        lines.append(f"{path},{GROUPS['shade'][shade]},{GROUPS['hue'][hue] if hue >= 0 else ''}")
    (root / name).write_text("\n".join(lines))
    return labels


def test_groups_have_a_softmax_and_an_accuracy_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = write_folders(root / "photos", "test", 21)
    labels = write_groups(root, found, "truth.csv")
    answers, told = classify(capsys, "truth.csv", "--classes", "groups.yaml")
    right: dict[str, list[bool]] = {title: [] for title in GROUPS}
    scale = float(make_module().model.logit_scale.detach().exp())
    cosines = {title: scored(found, names)[0].tolist() for title, names in GROUPS.items()}
    for number, (answer, (path, _)) in enumerate(zip(answers, found, strict=True)):
        assert answer["image"] == path
        for place, (title, names) in enumerate(GROUPS.items()):
            logits = [scale * cosine for cosine in cosines[title][number]]
            whole = sum(math.exp(each) for each in logits)
            expected = {name: math.exp(each) / whole for name, each in zip(names, logits, strict=True)}
            shown = [each for each in answer["classes"] if each["group"] == title]  # pyright: ignore
            assert {each["class"]: each["probability"] for each in shown} == pytest.approx(expected, abs=2e-6)
            assert shown[0]["class"] == max(expected, key=lambda name: expected[name])
            if labels[number][place] >= 0:
                right[title].append(shown[0]["class"] == names[labels[number][place]])
    for title, each in right.items():
        assert f"{title}: accuracy: {100 * sum(each) / len(each):.1f} % of {len(each)} images" in told
    assert f"hue: not counted: {21 - len(right['hue'])} images, without a class in the table" in told
    assert {path.name for path in root.glob("classify*.html")} == {"classify_hue.html", "classify_shade.html"}
    run_command(["classify", "photos", "--classes", "groups.yaml", *OPTIONS, "--output", "csv", "--top_k", "1"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    chosen = [(row["image"], row["group"], row["class"]) for row in rows]
    best = [(each["image"], one["group"], one["class"]) for each in answers for one in each["classes"]]  # pyright: ignore
    firsts = {(image, title): name for image, title, name in reversed(best)}
    assert chosen == [(image, title, firsts[image, title]) for image, _ in found for title in GROUPS]
    assert {row["rank"] for row in rows} == {"1"}
    run_command(["classify", "photos", "--classes", "groups.yaml", *OPTIONS])
    table = capsys.readouterr().out
    assert all(word in table for word in ("group", "hue", "shade", "probability"))


def test_each_group_has_a_head_of_its_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_folders(root / "examples", "train", 21)
    photos = write_folders(root / "photos", "test", 12)
    write_groups(root, examples, "labelled.csv")
    words = ["photos", "--classes", "groups.yaml", "--examples", "labelled.csv", *SAVED]
    answers, told = classify(capsys, *words)
    assert "hue:\nhead of 3 classes, fitted on " in told
    model = make_module().model.eval()
    for title, names in GROUPS.items():
        head = load_head(f"head_{title}.safetensors")
        assert head.facts.names == names
        likely = head.on(model).classify([path for path, _ in photos])
        for answer, values in zip(answers, likely, strict=True):
            shown = {each["class"]: each["probability"] for each in answer["classes"] if each["group"] == title}  # pyright: ignore
            shown.pop("none of these", None)
            assert shown == pytest.approx(dict(zip(names, values.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("- red\n- blue\n", [], "groups.yaml: must be groups with two names or more, such as colour"),
        ("colour: [red]\n", [], "groups.yaml: colour: must be groups"),
        ("striped: [yes, no]\n", [], "striped: must be groups .* put yes, no and numbers in quotes"),
        ("a/../b: [red, blue]\n", [], "would be part of metric and file names"),
        ("image: [red, blue]\n", [], "rename the group"),
        ("colour: [red, RED]\n", [], "named more than once"),
        ("colour: [red, blue]\n", ["--sheet", "x.html"], "--sheet: no image"),
        ("colour: [red, blue]\n", ["--examples", "photos"], "groups need a .csv or .tsv table"),
        ("colour: [red, blue]\n", ["--examples", "t.csv"], "t.csv: line 2: colour: red, blue; name one"),
        ("shape: [round, flat]\n", ["--examples", "t.csv"], "t.csv: has no column shape"),
        ("size: [big, small]\n", ["--examples", "t.csv", "--label_next", "2"], "--label_next: lists images for one"),
    ],
)
def test_mistakes_with_groups_are_one_line(text: str, words: list[str], message: str, root: Path) -> None:
    write_folders(root / "photos", "test", 7)
    (root / "groups.yaml").write_text(text)
    (root / "t.csv").write_text("image,colour,size\nphotos/red/000.png,red; blue,big\n")
    with pytest.raises(InputError, match=message) as error:
        run_command(["classify", "photos", "--classes", "groups.yaml", *words, *OPTIONS])
    assert "\n" not in str(error.value)
