"""``lit-clip demo``: a page on this machine for trying a model."""

import importlib.util
import os
import socket
from pathlib import Path

from lit_clip import load_model
from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions
from lit_clip.commands.demo_trial import Trial
from lit_clip.commands.search import Searched, holds_features, read_searched, search_in
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.image_files import images_in
from lit_clip.errors import InputError, require
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import OnError


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
            searched = search_in(clip, path, files, index, EncodingSettings(on_error=on_error))
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
