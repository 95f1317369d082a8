"""Publish a model: its card, and the upload of its folder to the hub."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import yaml

from lit_clip.errors import InputError, listed, one_printable_line, require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import HuggingFaceTextConfig
from lit_clip.models.preprocess import resize_size
from lit_clip.tools.html import render
from lit_clip.tools.imports import __version__
from lit_clip.tools.reading import first_line
from lit_clip.tools.weight_files import is_path
from lit_clip.weights.export import Parity
from lit_clip.weights.formats import FORMATS, OnnxDType, tolerance_of
from lit_clip.weights.hugging_face import hugging_face_kind, library_name

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


class ExportedSource(NamedTuple):
    """Name of an export's source, and its file's SHA-256; None for a model from the hub or a registry."""

    name: str
    sha256: str | None


def model_card(
    model: CLIP,
    format: str,
    name: str,
    source: ExportedSource,
    parity: Parity,
    license: str | None,
    repository: str | None = None,
    dtype: OnnxDType = "float32",
) -> str:
    """Return the card of an export as Markdown, with the front matter that model hubs read.

    ``format`` is a key of :data:`lit_clip.weights.formats.FORMATS`; the ``name`` is the folder's; no ``license`` is an
    unknown one. The card's code opens the model from the ``repository`` ``org/name`` on the hub, if given.
    """
    library = FORMATS[format].library
    front = {"library_name": library, "pipeline_tag": "zero-shot-image-classification", "tags": ["clip"]}
    if license:
        front["license"] = license
    config = json.loads(json.dumps(model.config.to_dict()))  # tuples as lists
    config["text"].pop("model", None)  # pages long, and in the exported configuration too
    for part in (config["text"], config["text"].get("tokenizer") or {}):
        for key in {"hugging_face", "source"} & part.keys():
            part[key] = Path(part[key]).name if is_path(part[key]) else part[key]  # a folder of this machine
    details = yaml.safe_dump(config, sort_keys=False)
    text, name = model.config.text, one_printable_line(name)
    card = render(
        TEMPLATE,
        front=yaml.safe_dump(front, sort_keys=False),
        title=repository.rpartition("/")[2] if repository else name,
        library=library,
        facts=_facts(model, format, source, parity, license, dtype),
        repository=repository,
        format=format,
        place=_place(format, name, repository).replace("\\", "\\\\").replace('"', '\\"'),
        want=model.preprocessing,
        larger=resize_size(model.preprocessing),
        kind=library_name(hugging_face_kind(model.config)) if format == "hugging_face" else None,
        embed_dim=model.config.embed_dim,
        text_source=text.hugging_face if isinstance(text, HuggingFaceTextConfig) else None,
        clean=None if text.tokenizer is None else text.tokenizer.clean,
        fence=_more_ticks(details, 3),  # no line in the details ends their block
        details=details,
    )
    return f"{card}\n"


def _facts(
    model: CLIP, format: str, source: ExportedSource, parity: Parity, license: str | None, dtype: OnnxDType
) -> dict[str, str]:
    total = sum(p.numel() for p in model.parameters())
    image = sum(p.numel() for p in model.visual.parameters())
    digest = f", SHA-256 `{source.sha256}`" if source.sha256 else ""
    measured = [f"image features {parity.image:.1e}", f"text features {parity.text:.1e}"]
    tested = "" if parity.pixels is None else "; preprocessing within one of 255 levels"
    tested += "" if parity.tokens is None else f"{',' if tested else ';'} token ids equal"
    return {
        "exported from": f"{_code(source.name)}{digest}",
        "by": f"lit-clip {__version__}",
        "licence of the weights": license or "unknown",
        "parameters": f"{total:,} (image encoder {image:,})",
        "weights": dtype,
        "embedding": f"{model.config.embed_dim} channels",
        "logit scale": f"{float(model.logit_scale.exp()):.4f}",
        **({} if model.logit_bias is None else {"logit bias": f"{float(model.logit_bias):.4f}"}),
        "largest difference from the original": f"{', '.join(measured)} (unit length, tolerance "
        f"{tolerance_of(format, dtype):.0e}){tested}",
    }


def _place(format: str, name: str, repository: str | None) -> str:
    """Return where the card's code finds the model: on the hub, or in the folder above it."""
    if format == "open_clip":
        return f"hf-hub:{repository}" if repository else f"local-dir:{name}"
    if repository is None:
        return name
    return repository.rpartition("/")[2] if format in ("onnx", "immich") else repository


def _code(text: str) -> str:
    """Return text as code for a Markdown table cell; the text can end neither the code nor the cell."""
    text = one_printable_line(text).replace("|", "\\|")
    ticks = _more_ticks(text, 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _more_ticks(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


HUBS_OWN = ".gitattributes"  # the hub makes it with the repository
LOGIN = "run hf auth login"


class Repository(NamedTuple):
    """A model repository ``org/name`` on the hub, in its state at the time of the look-up."""

    name: str
    private: bool  # whether it is, or for a new one shall be, seen by its owners only
    commit: str | None  # the newest; None if the repository does not exist
    files: frozenset[str]

    def check(self, names: Collection[str], card: str) -> None:
        """Raise :class:`InputError` if the hub refuses the model card, or other files would remain there."""
        from huggingface_hub import ModelCard

        others = listed(sorted(self.files - {*names, HUBS_OWN}))
        problem = f"holds other files than this format's ({others}); name another repository; nothing was written, "
        require(not others, f"--push {self.name}: {problem}uploaded or deleted")
        try:
            ModelCard(card).validate()
        except Exception as error:  # of the hub, or of the library that speaks HTTP
            raise _refusal(self.name, error, "the hub refuses the model card", "nothing was written") from error


def find_repository(name: str, private: bool) -> Repository:
    """Look up ``org/name``, which may not exist yet, before anything is computed."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    require(name.count("/") == 1, f"--push {name}: must be a repository on the hub, org/name")
    require(get_token() is not None, f"--push {name}: no token of the hub; {LOGIN}")
    try:
        info = HfApi().model_info(name)
    except HFValidationError as error:
        raise InputError(f"--push {name}: not a name of a repository ({first_line(error)})") from error
    except RepositoryNotFoundError:
        return Repository(name, private, None, frozenset())
    except Exception as error:  # of the hub, or of the library that speaks HTTP
        raise _refusal(name, error, "cannot be looked up", "nothing was written") from error
    advice = "change it in its settings on the hub, or name another"
    require(info.private or not private, f"--push {name}: is public, and --private is for new repositories; {advice}")
    return Repository(name, bool(info.private), info.sha, frozenset(file.rfilename for file in info.siblings or ()))


def upload(folder: Path, repository: Repository) -> str:
    """Upload a folder, to a new repository if none exists, and return its address.

    It is one commit: the repository gets all files or none. Files of the same name are replaced in its newest version;
    none is deleted. Ctrl-C is raised again with a message that says how to go on.
    """
    from huggingface_hub import HfApi

    api, name = HfApi(), repository.name
    again = f"the export is complete in {folder}: hf upload {name} {quote(str(folder))} . uploads it"
    if repository.private and repository.commit is None:
        again += ", with --private"
    try:
        if repository.commit is None:
            api.create_repo(name, private=repository.private or None)  # None: the organization's default
        what = {"commit_message": "Upload by lit-clip export", "parent_commit": repository.commit}
        done = api.upload_folder(repo_id=name, folder_path=folder, **what)
    except Exception as error:  # of the hub, or of the library that speaks HTTP
        raise _refusal(name, error, "the upload failed", again) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"--push {name}: the upload is not complete; {again}") from None
    return str(done.repo_url)


def _refusal(name: str, error: Exception, what: str, left: str) -> InputError:
    cause: BaseException = error  # an upload's error names the file, its cause the reason
    while getattr(cause, "response", None) is None and (below := cause.__cause__ or cause.__context__) is not None:
        cause = below
    status = getattr(getattr(cause, "response", None), "status_code", None)
    advice = {
        401: f"the hub does not accept your token; {LOGIN}",
        403: f"your token may not write there; {LOGIN} with a token that may, or name a repository of your own",
        409: "exists, but your token may not see it, or it was made just now; name another",
        412: "has changed meanwhile; look at it and upload again",
    }.get(status or 0, f"{what} ({first_line(cause)})")
    return InputError(f"--push {name}: {advice}; {left}")
