"""The paper's prompts are complete, lists are matched to their sets, and a classifier is built once."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml

from lit_clip import zero_shot_classifier
from lit_clip.errors import InputError
from lit_clip.evaluation import prompts as module
from lit_clip.evaluation.prompts import Prompts, prompts_of, templates_of, text_classifier
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.models.fingerprint import text_sha256

COUNTS = {  # classes and templates, counted in the paper's own files
    "Food101": (101, 1),
    "CIFAR10": (10, 18),
    "CIFAR100": (100, 18),
    "Birdsnap": (500, 1),
    "SUN397": (397, 2),
    "StanfordCars": (196, 8),
    "FGVCAircraft": (100, 2),
    "VOC2007": (20, 1),
    "DTD": (47, 8),
    "OxfordPets": (37, 1),
    "Caltech101": (102, 34),
    "Flowers102": (102, 1),
    "MNIST": (10, 1),
    "FER2013": (7, 6),
    "STL10": (10, 2),
    "EuroSAT": (10, 3),
    "RESISC45": (45, 18),
    "GTSRB": (43, 3),
    "KITTI": (4, 1),
    "Country211": (211, 5),
    "PCam": (2, 1),
    "UCF101": (101, 48),
    "Kinetics700": (700, 28),
    "CLEVRCounts": (8, 1),
    "HatefulMemes": (2, 1),
    "RenderedSST2": (2, 1),
    "ImageNet": (1000, 80),
}
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep"
)
EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
OWN_ORDER = {  # sets whose label order differs from the paper's file
    "VOC2007": [*VOC.split(), "sofa", "train", "tvmonitor"],
    "CLEVRCounts": [str(number) for number in range(3, 11)],
    "EuroSAT": EUROSAT.split(),
}


def paper_prompts(name: str) -> Prompts:
    """Prompts for a set whose class names are the paper's, or numbers."""
    own = OWN_ORDER.get(name) or paper_classes(name)
    return prompts_of(f"paper:{name}", f"paper:{name}", own)


def paper_classes(name: str) -> list[str]:
    """The first name of each class in the paper's order."""
    return [names[0] for names in module._classes(f"paper:{name}", []).names]


@pytest.mark.parametrize("name", COUNTS)
def test_every_set_of_table_9_has_the_papers_number_of_names_and_templates(name: str) -> None:
    classes, templates = COUNTS[name]
    prompts = paper_prompts(name)
    names = 12 if name == "FER2013" else classes  # its classes have up to three
    assert len(templates_of(f"paper:{name}")) == templates
    assert len(prompts.names) == len(prompts.texts) == classes
    assert sum(len(texts) for texts in prompts.texts) == names * templates
    assert len(set(prompts.names)) == (998 if name == "ImageNet" else classes)
    assert not any("{" in text or "}" in text for texts in prompts.texts for text in texts)


def test_the_paper_lists_are_those_of_table_9() -> None:
    assert list(module._paper()) == list(COUNTS)


@pytest.mark.parametrize(
    ("name", "label", "first", "last"),
    [
        ("Food101", 52, "a photo of gyoza, a type of food.", "a photo of gyoza, a type of food."),
        ("CIFAR10", 9, "a photo of a truck.", "a photo of the big truck."),
        ("Birdsnap", 3, "a photo of a Allens Hummingbird, a type of bird.", None),
        ("SUN397", 85, "a photo of a cathedral outdoor.", "a photo of the cathedral outdoor."),
        ("StanfordCars", 173, "a photo of a Ram C/V Cargo Van Minivan 2012.", None),
        ("VOC2007", 10, "a photo of a diningtable.", None),
        ("Caltech101", 1, "a photo of a off-center face.", "a doodle of the off-center face."),
        ("Caltech101", 30, "a photo of a head of a  crocodile.", None),
        ("Flowers102", 101, "a photo of a blackberry lily, a type of flower.", None),
        ("MNIST", 7, 'a photo of the number: "7".', None),
        ("EuroSAT", 0, "a centered satellite photo of annual crop land.", None),
        ("EuroSAT", 9, "a centered satellite photo of lake or sea.", "a centered satellite photo of the lake or sea."),
        ("RESISC45", 44, "satellite imagery of wetland.", "aerial view of the wetland."),
        ("GTSRB", 14, 'a zoomed in photo of a "stop" traffic sign.', 'a close up photo of a "stop" traffic sign.'),
        ("KITTI", 3, "a photo i took with no car.", None),
        ("Country211", 37, "a photo i took in Cote d'Ivoire.", "a photo showing the country of Cote d'Ivoire."),
        ("PCam", 1, "this is a photo of lymph node containing metastatic tumor tissue", None),
        ("UCF101", 0, "a photo of a person Apply Eye Makeup.", None),
        ("UCF101", 100, "a photo of a person Yo Yo.", "a demonstration of the person practicing Yo Yo."),
        ("Kinetics700", 608, "a photo of talking on cell phone.", None),
        ("Kinetics700", 699, "a photo of zumba.", "a demonstration of a person practicing zumba."),
        ("CLEVRCounts", 7, "a photo of 10 objects.", None),
        ("HatefulMemes", 1, "a hatespeech meme.", None),
        ("RenderedSST2", 0, "a negative review of a movie.", None),
        ("ImageNet", 0, "a bad photo of a tench.", "a tattoo of the tench."),
    ],
)
def test_prompts_equal_the_papers_letter_for_letter(name: str, label: int, first: str, last: str | None) -> None:
    texts = paper_prompts(name).texts[label]
    assert texts[0] == first
    assert last is None or texts[-1] == last


def test_class_names_of_our_own_files_are_sorted_as_in_the_paper() -> None:
    """A typing mistake in a long list would rarely keep it sorted."""
    for name in ("Birdsnap", "Food101", "Kinetics700", "DTD", "RESISC45", "UCF101", "FGVCAircraft"):
        mark = "_" if name in ("Food101", "RESISC45") else " "
        classes = [entry.replace(" ", mark) for entry in paper_classes(name)]
        assert classes == sorted(classes, key=str.lower if name == "Kinetics700" else None), name


def test_every_list_of_clip_benchmark_is_used_as_it_is() -> None:
    """One of them has a class with an empty name."""
    for name, classes in module._package("classes").items():
        numbers = [str(label) for label in range(len(classes))]
        assert prompts_of(f"clip_benchmark:{name}", "{}", numbers).names == classes


def test_aliases_match_classes_that_a_set_names_differently() -> None:
    folders = ["yin_yang", "Faces_easy", "BACKGROUND_Google"]
    others = [
        name
        for name in paper_classes("Caltech101")
        if name not in ("yin and yang symbol", "centered face", "background")
    ]
    names = prompts_of("paper:Caltech101", None, [*folders, *others]).names
    assert names[:3] == ["yin and yang symbol", "centered face", "background"]
    assert names[3:] == others
    pets = ["american_pit_bull_terrier", *(n for n in paper_classes("OxfordPets")[::-1] if "pit bull" not in n)]
    assert prompts_of("paper:OxfordPets", None, pets).names[:2] == ["american pit bull terrier", "yorkshire terrier"]


def test_names_keep_their_order_for_a_set_that_numbers_its_classes() -> None:
    numbers = [str(number) for number in range(43)]
    assert prompts_of("paper:GTSRB", "paper:GTSRB", numbers).names[14] == "stop"


def test_every_name_of_a_class_is_put_into_every_template() -> None:
    own = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    prompts = prompts_of("paper:FER2013", "paper:FER2013", own)
    assert prompts.names == ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
    assert [len(texts) for texts in prompts.texts] == [6, 6, 6, 12, 12, 18, 12]
    assert prompts.texts[3][6:8] == [
        "a photo of a smiling looking face.",
        "a photo of a face showing the emotion: smiling.",
    ]


def test_prompts_default_to_the_sets_own_names_and_template() -> None:
    prompts = prompts_of(None, None, ["cat", "dog"])
    assert prompts == Prompts(["cat", "dog"], [["a photo of a cat."], ["a photo of a dog."]])
    assert prompts_of(None, "{}", ["cat", "dog"]).texts == [["cat"], ["dog"]]
    assert prompts_of([["cat", "kitten"], "dog"], ["a {}", "{}!"], ["0", "1"]).texts == [
        ["a cat", "cat!", "a kitten", "kitten!"],
        ["a dog", "dog!"],
    ]


def test_lists_of_installed_packages_are_found_by_name() -> None:
    assert prompts_of("imagenet", "imagenet", [str(number) for number in range(1000)]).texts[999][79] == (
        open_clip.OPENAI_IMAGENET_TEMPLATES[79]("toilet paper")
    )
    svhn = prompts_of("clip_benchmark:svhn", "clip_benchmark:svhn", [str(number) for number in range(10)])
    assert svhn.texts[3][0] == "a photo of the number three written on a sign"
    assert len(templates_of("clip_benchmark:resisc45")) == 4  # not the paper's 18


def test_prompts_can_be_a_mapping_or_a_file(tmp_path: Path) -> None:
    own = ["cat", "hot dog"]
    by_class = {"hot_dog": ["a sausage in a bun", "street food"], "cat": "a purring animal"}
    expected = Prompts(["cat", "hot_dog"], [["a purring animal"], ["a sausage in a bun", "street food"]])
    assert (
        prompts_of({"hot_dog": ["a sausage in a bun", "street food"], "cat": ["a purring animal"]}, None, own)
        == expected
    )
    file = tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump(by_class))
    assert prompts_of(str(file), None, own) == expected
    file.write_text("classes: [cat, [hot dog, frankfurter]]\ntemplates: ['a {}', 'my {}']\n")
    both = prompts_of(str(file), None, own)
    assert both.texts == [["a cat", "my cat"], ["a hot dog", "my hot dog", "a frankfurter", "my frankfurter"]]
    assert prompts_of(str(file), "the {}", own).texts == [["the cat"], ["the hot dog", "the frankfurter"]]
    assert templates_of(str(file)) == ["a {}", "my {}"]
    file.write_text("[3, 4.5]")
    assert prompts_of(str(file), None, own).names == ["3", "4.5"]


@pytest.mark.parametrize(
    ("class_names", "templates", "message"),
    [
        ("paper:CIFAR10", None, "paper:CIFAR10: 10 class names, but the set has 2 classes"),
        (["cat", "dog", "cow"], None, "3 class names, but the set has 2 classes; give one per class, in label order"),
        (["hot dog", "cat"], None, "the set's class names in another order"),
        ("paper:Cifar10", None, "the paper has no 'Cifar10'; it has Food101, CIFAR10"),
        ("clip_benchmark:cars", None, "clip-benchmark has no 'cars'; it has flowers, gtsrb"),
        ("cifar10", None, "'cifar10' must be imagenet, paper:NAME, clip_benchmark:NAME or a YAML file"),
        ("no.yaml", None, "class_names: no.yaml: there is no such file"),
        ([True, "cat"], None, "True is not a string; put it in quotes"),
        (["", "cat"], None, "a name or prompt is empty"),
        ([[], "cat"], None, "a class has no name"),
        ({"cat": ["a"], "hot dog": ["b"]}, "{}", "has whole prompts; leave the templates out"),
        (None, ["a photo"], "'a photo' has no {}"),
        (None, "a photo", "'a photo' has no {} and is neither"),
        (None, [], "templates: empty"),
        (None, "paper:Nothing", "the paper has no 'Nothing'"),
        (None, "clip_benchmark:nothing", "clip-benchmark has no 'nothing'"),
    ],
)
def test_a_list_that_does_not_fit_the_set_is_an_error(class_names: Any, templates: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        prompts_of(class_names, templates, ["cat", "hot dog"])
    assert message in str(refusal.value)


def test_a_list_that_can_only_be_matched_by_name_needs_every_name() -> None:
    with pytest.raises(
        InputError, match="paper:VOC2007: the set's class 'bike' is not in the list, whose order is not the set's"
    ):
        prompts_of("paper:VOC2007", None, ["bike", *OWN_ORDER["VOC2007"][1:]])


def test_a_missing_clip_benchmark_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "clip_benchmark" else find(name))
    module._package.cache_clear()
    with pytest.raises(InputError, match="comes with clip-benchmark; install it"):
        templates_of("paper:CIFAR10")
    assert prompts_of("paper:UCF101", "paper:UCF101", paper_classes("UCF101")).names[0] == "Apply Eye Makeup"


def test_hash_depends_on_which_class_has_which_prompt() -> None:
    one, other = Prompts(["a", "b"], [["x", "y"], ["z"]]), Prompts(["a", "b"], [["x"], ["y", "z"]])
    assert one.sha256 == hashlib.sha256(json.dumps([["x", "y"], ["z"]]).encode()).hexdigest()
    assert one.sha256 != other.sha256


PROMPTS = Prompts(
    ["cat", "dog", "cow"], [["a cat", "a photo of a very small kitten"], ["dog"], ["a cow", "cows", "moo"]]
)


@pytest.fixture
def tiny_config(tiny_config: CLIPConfig) -> CLIPConfig:
    """The shared one with a text encoder wide enough that random weights tell texts apart."""
    return replace(tiny_config, text=replace(tiny_config.text, width=64))


@pytest.fixture
def clip(tiny_config: CLIPConfig) -> CLIP:
    model = CLIP(tiny_config).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(30)  # fresh weights give every text nearly the same feature
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_a_classifier_column_is_the_mean_of_the_classs_prompts(clip: CLIP, batch_size: int) -> None:
    classifier = text_classifier(clip, PROMPTS, batch_size=batch_size)
    assert not classifier.requires_grad
    with torch.no_grad():
        for column, texts in zip(classifier.T, PROMPTS.texts, strict=True):
            features = clip.encode_text(clip.tokenize(texts), normalize=True)
            torch.testing.assert_close(column, F.normalize(features.mean(dim=0), dim=0), rtol=0, atol=1e-6)
    assert (classifier.T @ classifier - torch.eye(3)).max() < 0.99  # the classes differ


def test_classifier_equals_the_zero_shot_classifier_of_names_and_templates(clip: CLIP) -> None:
    prompts = prompts_of(None, ["a {}", "{}, seen from far away"], ["cat", "dog"])
    assert torch.equal(
        text_classifier(clip, prompts), zero_shot_classifier(clip, ["cat", "dog"], ["a {}", "{}, seen from far away"])
    )


def counted(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of texts of each call of the encoder."""
    calls: list[int] = []
    encode = clip.encode_text

    def encode_text(tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        calls.append(len(tokens))
        return encode(tokens, normalize)

    monkeypatch.setattr(clip, "encode_text", encode_text)
    return calls


def test_a_classifier_is_built_again_only_if_it_would_change(
    clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, cache = counted(clip, monkeypatch), tmp_path / "new" / "texts"
    made = text_classifier(clip, PROMPTS, cache)
    assert sum(calls) == 6
    assert torch.equal(text_classifier(clip, PROMPTS, cache), made)
    with torch.no_grad():
        clip.visual.conv1.weight.add_(1)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        clip.logit_scale.add_(1)
    assert torch.equal(text_classifier(clip, PROMPTS, cache), made)
    assert sum(calls) == 6  # it does not depend on these
    other = Prompts(PROMPTS.names, [*PROMPTS.texts[:2], ["a cow", "cows", "mu"]])
    assert not torch.equal(text_classifier(clip, other, cache), made)
    regrouped = Prompts(
        PROMPTS.names, [PROMPTS.texts[0][:1], PROMPTS.texts[0][1:] + PROMPTS.texts[1], PROMPTS.texts[2]]
    )
    assert not torch.equal(text_classifier(clip, regrouped, cache), made)
    assert sum(calls) == 18
    with torch.no_grad():
        clip.ln_final.bias[0] += 1
    assert not torch.equal(text_classifier(clip, PROMPTS, cache), made)
    with torch.autocast("cpu", torch.bfloat16):
        text_classifier(clip, PROMPTS, cache)
    assert sum(calls) == 30
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_a_damaged_cache_file_is_replaced(
    clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    made = text_classifier(clip, PROMPTS, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[:-20], "flipped": bytes(flipped), "empty": b"", "another": b"PK"}[damage])
    calls = counted(clip, monkeypatch)
    assert torch.equal(text_classifier(clip, PROMPTS, tmp_path), made)
    assert sum(calls) == 6
    assert path.read_bytes() == whole


def test_text_hash_depends_on_the_activation(clip: CLIP, tiny_config: CLIPConfig) -> None:
    same, other = CLIP(tiny_config), CLIP(replace(tiny_config, activation="quick_gelu"))
    for model in (same, other):
        model.load_state_dict(clip.state_dict())
    assert text_sha256(same) == text_sha256(clip) != text_sha256(other)


def test_a_class_without_a_prompt_is_an_error(clip: CLIP) -> None:
    for texts in ([], [["a"], []]):
        with pytest.raises(InputError, match="there are no classes, or a class has no prompt"):
            text_classifier(clip, Prompts([], texts))
