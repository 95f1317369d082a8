"""``lit-clip demo``: a page on this machine for trying a model, its functions, and limits on their input."""

import importlib.util
import os
import re
import socket
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from lit_clip import load_model
from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions, class_probabilities
from lit_clip.commands.search import Searched, encode_queries, holds_features, read_searched, search_in, small_image
from lit_clip.embedding.encode import Encoding
from lit_clip.embedding.image_files import images_in
from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import IMAGENET, check_templates, imagenet_templates, zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import OnError, image_for_model, image_size
from lit_clip.tools.untrusted import shortened

SHOWN = 512  # pixels of the longer side of an image found; nothing larger leaves this machine
MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64_000_000  # of an image that is uploaded
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 1_000  # that a click encodes, and in characters
MOST_IMAGES = 200  # that a search shows
Source = Path | BinaryIO | None  # of an image: its bytes on the page


def demo(
    *,
    model: str,
    images: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    index: str | None = None,
    on_error: OnError = "error",
    head: ClassOptions = NAMES_ALONE,
) -> None:
    """Try a model in a browser: classify an image, see where it shows texts, search a folder.

    Only this machine can open the page, unless --host says otherwise; nothing leaves the machine. Ctrl-C ends the demo.

    Args:
        model: a checkpoint, or a name that lit_clip.load_model understands.
        images: a folder to search, with its subfolders; or a file of features, whose images must lie below its folder.
        host: address to listen on; 0.0.0.0 lets everybody in the network use the page and see the folder's images.
        port: port to listen on; 0 for any that is free.
        index: the index of the folder, a .npz file; by default .lit-clip-index.npz in the folder.
        on_error: error ends the command at an image of the folder that cannot be read; skip lists it in a file
            beside the index.
        head: a file of lit-clip classify --save_head, of this model, whose classes have a tab of their own.
    """
    missing = [each for each in ("starlette", "uvicorn", "python_multipart") if importlib.util.find_spec(each) is None]
    require(not missing, f"demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    require(images is not None or index is None, f"--index {index}: belongs to --images; name the folder")
    path = Path(images) if images is not None else None
    stored = path is not None and holds_features(path, index, "32-true")
    files = images_in(path, on_error) if path and not stored else []
    classes = head.opened()
    with _listening(host, port) as listening:
        clip = load_model(model)
        if path is None:
            searched = None
        elif stored:
            searched = shown_below(path.parent, read_searched(path, clip))
        else:
            searched = search_in(clip, path, files, index, Encoding(on_error=on_error))
        clip = clip.to(best_device())
        from lit_clip.commands.demo_server import serve, web_app  # of the extra, which need not be installed

        app = web_app(Trial(clip, searched, clip.with_head(classes) if classes else None), model, host)
        shown = f"[{host}]" if ":" in host else host
        stderr().print(f"demo: http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        serve(app, listening)


def shown_below(folder: Path, searched: Searched) -> Searched:
    """Return rows without images outside the folder: a feature file may name any file, and others see the page."""
    root = os.path.abspath(folder) + os.sep
    inside = [file if file and os.path.abspath(file).startswith(root) else None for file in searched.files]
    return searched._replace(files=inside)


def _listening(host: str, port: int) -> socket.socket:
    """Return a listening socket; the first connection waits until the model is loaded."""
    require(0 <= port < 65536, f"--port {port}: must be from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); set another") from error


class Trial:
    """Functions of the page: a model, optional images to search, and the result of the model's ``with_head``."""

    def __init__(self, model: CLIP, searched: Searched | None = None, headed: Any = None) -> None:
        self.model, self.searched, self.headed = model, searched, headed
        # The next image mostly has the same classes.
        self._classifier = lru_cache(maxsize=8)(partial(zero_shot_classifier, model))

    def classify(self, image: Source = None, names: str = "", templates: str = "a photo of a {}.") -> dict[str, float]:
        """Return the probability of each class, as ``lit-clip classify`` does.

        Names are separated by commas or lines; templates are one a line, or ``imagenet``, the paper's 80.
        """
        opened = image_of(image)
        classes = list(dict.fromkeys(words(names.replace(",", "\n"))))
        prompts = imagenet_templates() if templates.strip() == IMAGENET else words(templates)
        least = 2 if self.model.logit_bias is None else 1
        require(len(classes) >= least, f"class names: {len(classes)}; type at least {least}, with commas between them")
        count, longest = len(classes) * len(prompts), max(map(len, classes))
        length = max((len(prompt) + prompt.count("{}") * longest for prompt in prompts), default=0)
        where = "class names and templates"
        require(count <= MOST_PROMPTS, f"{where}: {count:,} prompts; at most {MOST_PROMPTS:,}")
        require(length <= LONGEST_PROMPT, f"{where}: a prompt of {length:,} characters; at most {LONGEST_PROMPT:,}")
        check_templates(prompts, "prompt templates")
        features = self.model.encode([opened]).to(self.model.device)
        with torch.inference_mode():
            probabilities = class_probabilities(self.model, features, self._classifier(tuple(classes), tuple(prompts)))
        return dict(zip(classes, probabilities[0].tolist(), strict=True))

    def own_classes(self, image: Source = None) -> dict[str, float]:
        """Return the probability of each class of the head, as ``lit-clip classify --head`` does."""
        probabilities = self.headed.classify([image_of(image)])
        return dict(zip(self.headed.head.facts.names, probabilities[0].tolist(), strict=True))

    def search(self, text: str = "", count: int | str = 12) -> list[tuple[Image.Image, str]]:
        """Return small copies of the images that best match a text, with names and cosines; omit hidden images."""
        assert self.searched is not None
        require(bool(text.strip()), "nothing to search for: type a sentence")
        require(len(text) <= LONGEST_PROMPT, f"sentence: {len(text):,} characters; at most {LONGEST_PROMPT:,}")
        wanted = re.fullmatch(r"\d{1,3}", str(count))
        number = int(wanted[0]) if wanted else 0
        require(0 < number <= MOST_IMAGES, f"images: {shortened(count)}; must be a number from 1 to {MOST_IMAGES}")
        scores, rows = self.searched.nearest(encode_queries(self.model, [text], []), number)
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            path = self.searched.files[row]
            if path and (image := small_image(path, SHOWN)):  # it may have been removed since the folder was encoded
                found.append((image, f"{score:.3f} {self.searched.names[row]}"))
        return found


def image_of(image: Source) -> Image.Image:
    """Open an image, and refuse one that is too large."""
    if image is None:
        raise InputError("no image: drop one, or click to choose a file")
    width, height = image_size(image, "the image")
    require(width * height <= MOST_PIXELS, f"the image: {width} x {height} pixels; at most {MOST_PIXELS:,}")
    return image_for_model(image, "the image")


def words(text: str) -> list[str]:
    """Return the non-empty lines of a text, with single spaces; a file that the text names is never read."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]
