"""Results of an evaluation: saved as soon as they are computed, and cached by everything they depend on."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.suite import SuiteEntry, Task, suite_path
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import Fingerprint
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.hashing import hex_digest, sha256_of_file
from lit_clip.tools.imports import __version__
from lit_clip.tools.reading import read_json
from lit_clip.tools.untrusted import Count, convert, entries

MOST_LISTED = 20  # files by name
PACKAGES = (
    "torch",
    "torchmetrics",
    "torchvision",
    "lightning",
    "pillow",
    "timm",
    "transformers",
    "open-clip-torch",
    "clip-benchmark",
)


def cache_key(*values: Any) -> str:
    """Hash everything that a result depends on."""
    return hex_digest([json.dumps(values, sort_keys=True, default=str)])


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hash this package's code: another version of it computes results again."""
    return hex_digest([path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))])


def provenance(
    name: str, model: CLIP, fingerprint: Fingerprint, precision: str, suite: Sequence[str]
) -> dict[str, Any]:
    """Return the part of ``results.json`` that names model, packages and suite."""
    architecture = model.config.to_dict()
    versions = {package: next((each.version for each in distributions(name=package)), None) for package in PACKAGES}
    return {
        "lit_clip": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": name,
            "fingerprint": fingerprint.model,
            "weights_sha256": fingerprint.weights,
            "preprocessing": architecture.pop("preprocessing"),
            "architecture": architecture,
            "activation": model.config.activation,
            "embed_dim": model.config.embed_dim,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "precision": precision,
        "suite": [{"path": path, "sha256": sha256_of_file(suite_path(path))} for path in suite],
        "packages": versions,
    }


def files_read(sets: Sequence[ImageSet], root: Path) -> dict[str, Any]:
    """Return the ``annotations`` and ``images`` of a split's folds, each file once, relative to ``root``.

    Sets with the same name can have different files. Both are lists of ``path`` and ``bytes``, or for more than 20
    files their number and a hash of their sorted names.
    """
    prefix = os.path.join(os.fspath(root), "")  # text, since there can be a million paths
    annotations = {os.fspath(path) for images in sets for path in images.annotation_paths}
    images = {os.fspath(path) for images in sets for path in images.image_paths()}
    return {"annotations": _described(annotations, prefix), "images": _described(images - annotations, prefix)}


def _described(paths: Iterable[str], prefix: str) -> list[dict[str, Any]] | dict[str, Any]:
    named = sorted((path.removeprefix(prefix), path) for path in paths)
    if len(named) > MOST_LISTED:
        return {"files": len(named), "names_hash": hex_digest(name for name, _ in named)}
    return [{"path": name, "bytes": os.path.getsize(path) if os.path.isfile(path) else None} for name, path in named]


class Results:
    """Results of a run by set, and their cache in the run's folder, which must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sets: dict[str, dict[str, Any]] = {}

    def begin(self, name: str, entry: SuiteEntry) -> None:
        told = {key: getattr(entry, key) for key in ("how_to_get", "note", "metric", "paper")}
        self.sets[name] = {"status": "done", "reason": "", **told, "splits": {}, "tasks": {}}

    def update(self, name: str, **values: Any) -> None:
        self.sets[name] |= values

    def add_reason(self, name: str, reason: str) -> None:
        """Append a reason why a set is incomplete to the earlier ones, unless it is already there."""
        earlier = self.sets[name]["reason"]
        if reason not in earlier:
            self.sets[name]["reason"] = "; ".join(filter(None, (earlier, reason)))

    def cached(self, name: str, task: Task, key: str) -> dict[str, Any] | None:
        """Return the result of an earlier run with the same :func:`cache_key`.

        None if there is none, or if one of its files is gone, or its file of predictions is another run's.
        """
        saved = self._saved(name).get(task)
        if saved is None or saved["key"] != key:
            return None
        result: dict[str, Any] = saved["result"]
        if not all((self.folder / file).is_file() for file in result.get("files", [])):
            return None
        if "predictions" not in result:
            return result
        path, known = self.folder / result["predictions"], result.get("predictions_sha256")
        return result if path.is_file() and sha256_of_file(path) == known else None

    def _saved(self, name: str) -> Mapping[str, Any]:
        """Return the saved results of a set, by task, without damaged ones."""
        found = {}
        with suppress(InputError):
            saved = convert(read_json(self._file(name)), dict[str, object])
            for task, result in saved.items():
                with suppress(InputError):
                    convert(result, _SAVED)
                    found[task] = result
        return found

    def add(self, name: str, task: Task, key: str, result: Mapping[str, Any]) -> None:
        self.sets[name]["tasks"][task] = dict(result)
        path = self._file(name)
        make_folder(path.parent)
        saved = {**self._saved(name), task: {"key": key, "result": result}}
        with replacing(path) as draft:
            draft.write_text(json.dumps(saved), encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.folder / "sets" / f"{name}.json"

    def write(self, head: Mapping[str, Any]) -> dict[str, Any]:
        everything = {**head, "sets": self.sets}
        with replacing(self.folder / "results.json") as draft:
            text = without_secrets(json.dumps(everything, indent=1, ensure_ascii=False))
            draft.write_text(text, encoding="utf-8", errors="replace")
        return everything


def read_results(path: Path) -> dict[str, Any]:
    """Read the ``results.json`` of another run, given by its path or its folder."""
    path = path / "results.json" if path.is_dir() else path
    results = read_json(path)
    if not isinstance(results, dict) or not {"sets", "model"} <= results.keys():
        raise InputError(f"{path}: not the results.json of lit-clip evaluate")
    try:
        convert(results, _RESULTS)
        for name, entry in results["sets"].items():
            convert(entry, _SET, f"sets.{name}")
    except InputError as error:
        raise InputError(f"{path}: not the results.json of lit-clip evaluate, or damaged ({error})") from error
    return results


# What the table and the report of a comparison read, hours later; they check by themselves whether a number is one.
_TASK = entries(
    {
        **dict.fromkeys(("metrics", "intervals"), dict[str, object]),
        **dict.fromkeys(("predictions", "predictions_sha256", "judged"), str),
        **dict.fromkeys(("queries", "captions", "references", "documents"), Count),
        **dict.fromkeys(("given", "notes", "files"), list[str]),
        **dict.fromkeys(("shots", "head"), list[tuple[Count, list[object]]]),
        "search": list[tuple[float, object]],
        "confusions": list[tuple[object, object, object]],
        "confusion_matrix": list[list[Count]],
        "thresholds": entries({"classes": list[tuple[str, float, Count, float, float, float]]}),
        "errors": list[entries({"nearest": list[tuple[object, object]]})],
        "iou": list[tuple[str, object, object, Count]],
    }
)
_SAVED = entries({"key": str, "result": _TASK}, total=True)  # a task's
_SPLIT = entries({"images": Count, "absent": Count, "skipped": list[tuple[str, str]]})
_SET = entries(
    {
        **dict.fromkeys(("status", "reason", "how_to_get", "note", "metric", "paper"), str),
        "splits": dict[str, _SPLIT],
        "tasks": dict[str, _TASK],
        "prompts": entries({"texts": Count}),
    }
)
_RESULTS = entries({"sets": dict[str, object], "model": dict[str, object], "suite": list[dict[str, object]]})
