"""Sets in other languages: captions of XTD10 and Crossmodal-3600, and translated class names for ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import LabelledImages, PartOf
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.packaged import installed_file
from lit_clip.tools.reading import naming
from lit_clip.tools.untrusted import convert, entries
from .annotation_files import AGAIN, find, read_json, read_json_lines, read_text
from .image_files import CaptionedFiles, KnownLabels
from .imagenet import ImageNet, ImageNetSplit

TEXTS = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]


def XTD10(root: str, language: str) -> CaptionedFiles:
    """XTD10: 1,000 images of COCO 2014 with a caption in each of 11 languages (``en``, ``de``, ..., ``jp``, ``zh``).

    ``root`` has the authors' ``XTD10``, ``MIC`` and ``STAIR`` folders or the files in them, and the images: all in
    ``images``, or in COCO's ``train2014`` and ``val2014``.
    """
    top, folders = Path(root), ("XTD10/", "MIC/", "STAIR/", "")
    listed = find(top, [f"{folder}test_image_names.txt" for folder in folders], "list of images")
    file = f"test_1kcaptions_{language}.txt"
    path = find(top, [f"{folder}{file}" for folder in folders], f"captions in {language}")
    names = read_text(listed).split()
    captions = [[caption] for caption in read_text(path).splitlines()]
    if not names or len(captions) != len(names):
        raise InputError(f"{path}: {len(captions)} captions for {len(names)} images; {AGAIN}")
    images = find(top, ("images", "train2014", "val2014"), "images")
    folder_of = {split: "images" if images.name == "images" else split for split in ("train2014", "val2014")}
    names = [f"{folder_of['train2014' if 'train2014' in name else 'val2014']}/{name}" for name in names]
    return CaptionedFiles(top, names, captions, [listed, path])


def Crossmodal3600(root: str, language: str) -> CaptionedFiles:
    """Crossmodal-3600: 3,600 images with captions in 36 languages; the first caption is used, as in CLIP_benchmark.

    ``root`` has ``captions.jsonl`` and ``images``; the language is a code such as ``de``.
    """
    path, names, captions = find(Path(root), ("captions.jsonl",), "captions.jsonl"), [], []
    kind = entries({"image/key": str, language: entries({"caption": TEXTS}, total=True)}, total=True)
    for row in read_json_lines(path, kind):
        names.append(f"images/{row['image/key']}.jpg")
        captions.append([row[language]["caption"][0]])
    require(bool(names), f"{path}: no images in it; {AGAIN}")
    find(Path(root), ("images",), "images")
    return CaptionedFiles(Path(root), names, captions, [path])


class _TranslatedImageNet(KnownLabels, PartOf):
    """ImageNet, or some of its classes (labels, ascending), with other class names; it shares ImageNet's features."""

    def __init__(
        self, whole: LabelledImages, classes: Sequence[int], class_names: list[str], templates: list[str]
    ) -> None:
        self.whole, self.annotation_paths = whole, whole.annotation_paths
        self.class_names, self.templates = class_names, templates
        label_of, labels = {label: number for number, label in enumerate(classes)}, whole.labels()
        self.rows = [row for row, label in enumerate(labels) if label in label_of]
        self._labels = [label_of[labels[row]] for row in self.rows]

    def image_paths(self) -> Sequence[Path]:
        return self.whole.image_paths()

    def image(self, index: int) -> Image.Image:
        return self.whole.images(self.rows[index])[0]

    def check(self) -> None:
        self.whole.check()

    def key(self, index: int) -> str:
        return self.whole.key(self.rows[index])

    def stamp(self) -> str:
        return hex_digest([self.whole.stamp(), self.rows])


def _package_file(name: str) -> Path:
    return installed_file("clip_benchmark", "clip-benchmark", f"datasets/{name}")


def _entry(path: Path, language: str, kind: Any) -> Any:
    content = read_json(path, dict[str, Any])
    require(language in content, f"{path}: no {language!r}; it has {', '.join(content) or 'no languages'}")
    with naming(path):
        return convert(content[language], kind, language)


def TranslatedImageNet(root: str, language: str, split: ImageNetSplit = "val") -> _TranslatedImageNet:
    """ImageNet with CLIP_benchmark's translated class names and prompt templates, from the installed package.

    The language is ``ar``, ``cn``, ``it`` or ``jp``; ``root`` is the folder of :func:`ImageNet`.
    """
    files = [_package_file(f"{language}_{part}.json") for part in ("classnames", "zeroshot_classification_templates")]
    names, templates = (_entry(path, "imagenet1k", TEXTS) for path in files)
    templates = [text.replace("{c}", "{}") for text in templates]
    return _TranslatedImageNet(ImageNet(root, split), range(len(names)), names, templates)


def BabelImageNet(
    root: str, language: str, names: str | None = None, prompts: str | None = None, split: ImageNetSplit = "val"
) -> _TranslatedImageNet:
    """Babel-ImageNet: the classes of ImageNet that have a name in a language, scored among themselves.

    Without prompt templates in the language, the prompt is the name, as in the authors' ``label`` prompts.

    Args:
        root: the folder of :func:`ImageNet`.
        language: its code as in the files, such as ``DE``.
        names: the authors' ``babel_imagenet.json``: language -> labels and names; None: ``clip-benchmark``'s.
        prompts: the authors' ``nllb_dist13b_prompts.json``: language -> templates; None: ``clip-benchmark``'s.
        split: of ImageNet.
    """
    path = Path(names) if names else _package_file("babel_imagenet.json")
    classes, own_names = _entry(path, language, tuple[list[Annotated[int, Meta(ge=0, lt=1000)]], TEXTS])
    known = classes == sorted(set(classes)) and len(classes) == len(own_names)
    require(known, f"{path}: {language}: must be ascending labels, and as many names; {AGAIN}")
    file = Path(prompts) if prompts else _package_file("nllb_dist13b_prompts.json")
    templates = read_json(file, dict[str, TEXTS]).get(language, ["{}"])
    return _TranslatedImageNet(ImageNet(root, split), classes, own_names, templates)
