"""``lit-clip demo``: a page on this machine on which to try a model."""

import importlib.util
import re
import socket
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from lit_clip import load_model
from lit_clip.commands.classify import class_probabilities
from lit_clip.commands.search import Searched, encode_queries, search_in, small_image
from lit_clip.embedding.encoding_task import EncodingSettings
from lit_clip.embedding.image_files import images_in
from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import IMAGENET, check_templates, imagenet_templates, zero_shot_classifier
from lit_clip.heads import HeadedModel, load_head
from lit_clip.locating.locator import Locator
from lit_clip.locating.overlay import Scale, overlay
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import OnError, image_size, open_image
from lit_clip.tools.untrusted import shortened

SHOWN = 512  # pixels of the longer side of an image found; nothing larger leaves this machine
MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64_000_000  # of an image that is uploaded
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 1_000  # that a click encodes, and in characters
MOST_TEXTS = 20  # that a click finds in an image
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
    head: str | None = None,
) -> None:
    """Try a model in a browser: classify an image, see where it shows texts, search a folder.

    The page is for this machine only, unless --host says otherwise, and nothing is sent or fetched elsewhere. Ctrl-C
    ends it.

    Args:
        model: a checkpoint, or a name that lit_clip.load_model understands.
        images: a folder, searched with everything below. The first time it is encoded, as by lit-clip search.
        host: address to listen on; 0.0.0.0 lets everybody in the network use the page and see the folder's images,
            by this machine's addresses or its name.
        port: to listen on; 0 for any that is free.
        index: the index of the folder, a .npz file; by default .lit-clip-index.npz in the folder.
        on_error: error ends the command at an image of the folder that cannot be read; skip lists it in a file
            beside the index.
        head: a file of lit-clip classify --save_head, of this model, whose classes have a tab of their own.
    """
    missing = [each for each in ("starlette", "uvicorn", "python_multipart") if importlib.util.find_spec(each) is None]
    require(not missing, f"demo needs {' and '.join(missing)}: pip install 'lit-clip[demo]'")
    require(images is not None or index is None, f"--index {index}: belongs to --images; name the folder")
    require(index is None or index.endswith(".npz"), f"--index {index}: must be a .npz file")
    folder = Path(images) if images is not None else None
    files = images_in(folder, on_error) if folder else []
    classes = load_head(head) if head else None
    with _listening(host, port) as listening:
        clip = load_model(model)
        searched = search_in(clip, folder, files, index, EncodingSettings(on_error=on_error)) if folder else None
        clip = clip.to(best_device())
        from lit_clip.commands.demo_server import serve, web_app  # of the extra, which need not be installed

        app = web_app(Trial(clip, searched, classes.on(clip) if classes else None), model, host)
        shown = f"[{host}]" if ":" in host else host
        stderr().print(f"demo: http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        serve(app, listening)


class Trial:
    """Functions of the page: a model, the images to search, if any, and the model with a head."""

    def __init__(self, model: CLIP, searched: Searched | None = None, headed: HeadedModel | None = None) -> None:
        self.model, self.searched, self.headed = model, searched, headed
        # The next image mostly has the same classes.
        self._classifier = lru_cache(maxsize=8)(partial(zero_shot_classifier, model))
        self._locator = lru_cache(maxsize=8)(partial(Locator, model))

    def classify(self, image: Source = None, names: str = "", templates: str = "a photo of a {}.") -> dict[str, float]:
        """Return the probability of each class, as ``lit-clip classify`` does.

        Names are separated by commas or lines; templates are one a line, or ``imagenet``, the paper's 80.
        """
        opened = _opened(image)
        classes = list(dict.fromkeys(_words(names.replace(",", "\n"))))
        prompts = imagenet_templates() if templates.strip() == IMAGENET else _words(templates)
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
        assert self.headed is not None
        probabilities = self.headed.classify([_opened(image)])
        return dict(zip(self.headed.head.facts.names, probabilities[0].tolist(), strict=True))

    def locate(self, image: Source = None, texts: str = "", background: str = "") -> list[tuple[Image.Image, str]]:
        """Return a heat map over an image for each text, with its cosine, as ``lit-clip locate`` does.

        Texts are one a line, and so are those of the background; none of them: the command's own.
        """
        opened = _opened(image)
        wanted, others = list(dict.fromkeys(_words(texts))), _words(background)
        require(bool(wanted), "nothing to find: type a text a line")
        require(len(wanted) <= MOST_TEXTS, f"texts: {len(wanted)}; at most {MOST_TEXTS}")
        require(len(others) <= MOST_PROMPTS, f"background: {len(others):,} texts; at most {MOST_PROMPTS:,}")
        longest = max(map(len, [*wanted, *others]))
        require(longest <= LONGEST_PROMPT, f"a text of {longest:,} characters; at most {LONGEST_PROMPT:,}")
        located = self._locator(tuple(wanted), tuple(others) or None)(opened)
        scale, shown = Scale.around(located.level, max(region.cosine for region in located.regions)), []
        for text, cosines, region in zip(wanted, located.maps, located.regions, strict=True):
            found = f"{region.cosine:.3f}, {region.margin:+.3f}" if region.seen else f"not seen ({region.cosine:.3f})"
            drawn = overlay(opened, cosines, scale, region.cosine, region.box(opened.size))
            shown.append((drawn, f"{text}: {found}"))
        return shown

    def search(self, text: str = "", count: int | str = 12) -> list[tuple[Image.Image, str]]:
        """Return the images of the folder that best match a text, small, with their names and cosines."""
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


def _opened(image: Source) -> Image.Image:
    if image is None:
        raise InputError("no image: drop one, or click to choose a file")
    width, height = image_size(image, "the image")
    require(width * height <= MOST_PIXELS, f"the image: {width} x {height} pixels; at most {MOST_PIXELS:,}")
    return open_image(image, "the image")


def _words(text: str) -> list[str]:
    """Return the lines of a text that are not empty, with single spaces; never those of a file that it may name."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; the first to connect waits until the model is loaded."""
    require(0 <= port < 65536, f"--port {port}: must be from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); set another") from error
