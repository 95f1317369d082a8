"""``lit-clip demo``: a page on this machine on which to try a model."""

import importlib.util
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial, wraps
from html import escape
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from lit_clip import load_model
from lit_clip.commands.classify import class_probabilities
from lit_clip.commands.demo_limits import MOST_BYTES, MOST_IMAGES, Limits
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
from lit_clip.tools.html import plural
from lit_clip.tools.images import OnError, open_image

SHOWN = 512  # pixels of the longer side of an image found; nothing larger leaves this machine
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 1_000  # that a click encodes, and in characters
MOST_TEXTS = 20  # that a click finds in an image
QUEUE, WAITING = {"concurrency_id": "model", "concurrency_limit": 4}, 64  # a slow request leaves room for others
MOST_CONNECTIONS = 256
# The browser loads nothing from elsewhere, even if a version of gradio or a text on the page asks for it.
OWN_CONTENT = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_SHARE": "False"}
CSS = """
.gradio-container {max-width: 1100px !important; width: 100% !important; margin: 0 auto !important}
#found .grid-wrap, #where .grid-wrap {max-height: none; overflow: visible}
#found .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(160px, 38vw), 1fr)) !important}
#found .gallery-item, #where .gallery-item {aspect-ratio: auto}
#found .thumbnail-item, #where .thumbnail-item {height: auto; aspect-ratio: auto; overflow: visible}
#found .thumbnail-item img {aspect-ratio: 1; height: auto}
#where .thumbnail-item img {height: auto}
#found .caption-label, #where .caption-label
  {position: static; display: block; max-width: 100%; border: 0; white-space: nowrap}
#where .caption-label {white-space: normal}
"""


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
    require(importlib.util.find_spec("gradio") is not None, "demo needs gradio: pip install 'lit-clip[demo]'")
    require(images is not None or index is None, f"--index {index}: belongs to --images; name the folder")
    require(index is None or index.endswith(".npz"), f"--index {index}: must be a .npz file")
    folder = Path(images) if images is not None else None
    files = images_in(folder, on_error) if folder else []
    classes = load_head(head) if head else None
    with _listening(host, port) as listening, TemporaryDirectory(prefix="lit-clip-demo-") as uploads:
        clip = load_model(model)
        searched = search_in(clip, folder, files, index, EncodingSettings(on_error=on_error)) if folder else None
        stored = Path(uploads).resolve()
        os.environ.update(QUIET, GRADIO_TEMP_DIR=str(stored))  # gradio reads them when it is imported and used
        clip = clip.to(best_device())
        app = web_app(Trial(clip, searched, classes.on(clip) if classes else None), model, stored, host)
        shown = f"[{host}]" if ":" in host else host
        stderr().print(f"demo: http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        _serve(app, listening)


class Trial:
    """Functions of the page: a model, the images to search, if any, and the model with a head."""

    def __init__(self, model: CLIP, searched: Searched | None = None, headed: HeadedModel | None = None) -> None:
        self.model, self.searched, self.headed = model, searched, headed
        self._classifier = lru_cache(maxsize=8)(
            partial(zero_shot_classifier, model)
        )  # the next image mostly has the same classes
        self._locator = lru_cache(maxsize=8)(partial(Locator, model))

    def classify(self, image: str | None, names: str, templates: str) -> dict[str, float]:
        """Return the probability of each class, as ``lit-clip classify`` does.

        Names are separated by commas or lines; templates are one a line, or ``imagenet``, the paper's 80.
        """
        require(image is not None, "no image: drop one, or click to choose a file")
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
        features = self.model.encode([open_image(Path(str(image)), "the image")]).to(self.model.device)
        with torch.inference_mode():
            probabilities = class_probabilities(self.model, features, self._classifier(tuple(classes), tuple(prompts)))
        return dict(zip(classes, probabilities[0].tolist(), strict=True))

    def own_classes(self, image: str | None) -> dict[str, float]:
        """Return the probability of each class of the head, as ``lit-clip classify --head`` does."""
        assert self.headed is not None
        require(image is not None, "no image: drop one, or click to choose a file")
        probabilities = self.headed.classify([open_image(Path(str(image)), "the image")])
        return dict(zip(self.headed.head.facts.names, probabilities[0].tolist(), strict=True))

    def locate(self, image: str | None, texts: str, background: str) -> list[tuple[Image.Image, str]]:
        """Return a heat map over an image for each text, with its cosine, as ``lit-clip locate`` does.

        Texts are one a line, and so are those of the background; none of them: the command's own.
        """
        require(image is not None, "no image: drop one, or click to choose a file")
        wanted, others = list(dict.fromkeys(_words(texts))), _words(background)
        require(bool(wanted), "nothing to find: type a text a line")
        require(len(wanted) <= MOST_TEXTS, f"texts: {len(wanted)}; at most {MOST_TEXTS}")
        require(len(others) <= MOST_PROMPTS, f"background: {len(others):,} texts; at most {MOST_PROMPTS:,}")
        longest = max(map(len, [*wanted, *others]))
        require(longest <= LONGEST_PROMPT, f"a text of {longest:,} characters; at most {LONGEST_PROMPT:,}")
        opened = open_image(Path(str(image)), "the image")
        located = self._locator(tuple(wanted), tuple(others) or None)(opened)
        scale, shown = Scale.around(located.level, max(region.cosine for region in located.regions)), []
        for text, cosines, region in zip(wanted, located.maps, located.regions, strict=True):
            found = f"{region.cosine:.3f}, {region.margin:+.3f}" if region.seen else f"not seen ({region.cosine:.3f})"
            drawn = overlay(opened, cosines, scale, region.cosine, region.box(opened.size))
            shown.append((drawn, f"{text}: {found}"))
        return shown

    def search(self, text: str, count: int) -> list[tuple[Image.Image, str]]:
        """Return the images of the folder that best match a text, small, with their names and cosines."""
        assert self.searched is not None
        require(bool(text.strip()), "nothing to search for: type a sentence")
        require(len(text) <= LONGEST_PROMPT, f"sentence: {len(text):,} characters; at most {LONGEST_PROMPT:,}")
        query = encode_queries(self.model, [text], [])
        scores, rows = self.searched.nearest(query, min(max(1, count), MOST_IMAGES))
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            path = self.searched.files[row]
            if path and (image := small_image(path, SHOWN)):  # it may have been removed since the folder was encoded
                found.append((image, f"{score:.3f} {self.searched.names[row]}"))
        return found


def _words(text: str) -> list[str]:
    """Return the lines of a text that are not empty, with single spaces; never those of a file that it may name."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def web_app(trial: Trial, name: str, uploads: Path, host: str = "127.0.0.1") -> Limits:
    """Return the page and its API, ``/classify``, ``/locate`` and ``/search``, as an ASGI application.

    No file is served but those that the page's users upload, and the small images found; both are in ``uploads``, which
    is ``GRADIO_TEMP_DIR``. Other names than ``host`` are refused, so that no page of the internet can have its own name
    point here and read the answers.
    """
    # Not import statements: the type checker runs without the extra too.
    gr, fastapi = import_module("gradio"), import_module("fastapi")
    folder = trial.searched
    with gr.Blocks(title=f"{name} - lit-clip", analytics_enabled=False) as blocks:
        more = f", {plural(len(folder.names), 'image')}" if folder else ""
        parameters = sum(parameter.numel() for parameter in trial.model.parameters())
        gr.HTML(f"<h2 style='overflow-wrap: anywhere'>{escape(name)}</h2>{parameters / 1e6:,.1f} M parameters{more}")
        if folder:
            with gr.Tab("Search"):
                _search_tab(gr, trial)
        if trial.headed:
            with gr.Tab("Own classes"):
                _own_classes_tab(gr, trial)
        with gr.Tab("Classify"):
            _classify_tab(gr, trial)
        with gr.Tab("Where"):
            _where_tab(gr, trial)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options = {"ssr_mode": False, "mcp_server": False, "enable_monitoring": False, "pwa": False, "show_error": False}
    options |= {"footer_links": [], "max_file_size": MOST_BYTES}  # which the browser checks
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(app, blocks.queue(max_size=WAITING), "/", theme=theme, css=CSS, **options)
    # As gradio has it on Windows; elsewhere it looks for calls a thousand times a second, a tenth of a core.
    vars(blocks._queue).update(sleep_when_free=0.05, progress_update_sleep_when_free=0.1)
    functions = blocks.config["dependencies"]
    numbered: dict[int, int] = {each["id"]: len(each["inputs"]) for each in functions}
    named: dict[str, int] = {str(each["api_name"]): numbered[each["id"]] for each in functions}  # False: it has none
    return Limits(app, uploads, host, numbered, named)


def _image_input(gr: Any) -> Any:
    options = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "buttons": []}
    return gr.Image(label="Image", height=320, **options)


def _classify_tab(gr: Any, trial: Trial) -> None:
    with gr.Row():
        with gr.Column():
            image = _image_input(gr)
            names = gr.Textbox(
                label="Class names", placeholder="tiger, pizza, bicycle", info="with commas between them", max_lines=6
            )
            with gr.Accordion("Prompt templates", open=False):
                templates = gr.Textbox(
                    "a photo of a {}.", lines=3, show_label=False, info="one a line; or imagenet, the paper's 80"
                )
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            each = "" if trial.model.logit_bias is None else " of each class by itself"
            label = gr.Label(num_top_classes=10, label=f"Probability{each}")
    classify = _shown(gr, trial.classify)
    options = {"inputs": [image, names, templates], "outputs": label, **QUEUE}
    gr.on([button.click, names.submit], classify, api_name="classify", **options)
    # Dropping the next image is enough; the first comes before the names.
    image.upload(lambda *typed: classify(*typed) if typed[1].strip() else None, api_name=False, **options)


def _own_classes_tab(gr: Any, trial: Trial) -> None:
    with gr.Row():
        image = _image_input(gr)
        label = gr.Label(num_top_classes=10, label="Probability")
    image.upload(_shown(gr, trial.own_classes), [image], label, api_name="own_classes", **QUEUE)


def _where_tab(gr: Any, trial: Trial) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            image = _image_input(gr)
            texts = gr.Textbox(
                label="Texts", placeholder="a red kite\na dog", info="one a line; they compete", lines=3, max_lines=6
            )
            with gr.Accordion("Background", open=False):
                info = "texts of other things, one a line, 19 or more; by default 100 names"
                others = gr.Textbox(lines=3, show_label=False, info=info)
            button = gr.Button("Find", variant="primary")
        with gr.Column(scale=3):
            options = {"columns": 2, "object_fit": "contain", "format": "jpeg", "buttons": []}
            found = gr.Gallery(show_label=False, elem_id="where", **options)
            gr.HTML("The line on the bar is the level that texts of other things reach; a box is where a text is seen.")
    button.click(_shown(gr, trial.locate), [image, texts, others], found, api_name="locate", **QUEUE)


def _search_tab(gr: Any, trial: Trial) -> None:
    with gr.Row(equal_height=True):
        text = gr.Textbox(label="Sentence", placeholder="a red kite over the beach", scale=5, max_lines=3)
        count = gr.Number(12, label="Images", minimum=1, maximum=MOST_IMAGES, precision=0, scale=1, min_width=90)
    button = gr.Button("Search", variant="primary")
    found = gr.Gallery(show_label=False, elem_id="found", object_fit="contain", format="jpeg", buttons=[])
    events = [button.click, text.submit]
    gr.on(events, _shown(gr, trial.search), [text, count], found, api_name="search", **QUEUE)


def _shown(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function's :class:`InputError` shown on the page, without a traceback in the terminal."""

    @wraps(function)  # the API's names of the arguments
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; the first to connect waits until the model is loaded."""
    require(0 <= port < 65536, f"--port {port}: must be from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); set another") from error


def _serve(app: Any, listening: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was uploaded is removed then too
    uvicorn = import_module("uvicorn")
    headers = [("Content-Security-Policy", OWN_CONTENT), ("X-Content-Type-Options", "nosniff")]
    options = {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": 1, "ws": "none"}
    config = uvicorn.Config(app, log_level="warning", headers=headers, **options)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has ended
        uvicorn.Server(config).run(sockets=[listening])
