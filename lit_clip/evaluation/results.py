"""Results as they become known: kept at once, used again only for the same question, and with where they came from."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_clip import __version__
from lit_clip.errors import InputError
from lit_clip.evaluation.overview import rows, sets_of, shots_of
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.weights.fingerprint import weights_sha256

PACKAGES = ("torch", "torchvision", "lightning", "pillow", "timm", "transformers", "open-clip-torch", "clip-benchmark")


def recipe(*said: Any) -> str:
    """What a result depends on, as a short text: results with the same one need not be computed again."""
    return sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


def provenance(name: str, model: CLIP, fingerprint: str, precision: str, suite: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from: of ``results.json`` all but the sets."""
    architecture = model.config.to_dict()
    return {
        "lit_clip": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": name,
            "fingerprint": fingerprint,
            "weights_sha256": weights_sha256(model),
            "preprocessing": architecture.pop("preprocessing"),
            "architecture": architecture,
            "activation": model.config.activation,
            "embed_dim": model.config.embed_dim,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "precision": precision,
        "suite": [{"path": path, "sha256": sha256_of_file(Path(path))} for path in suite],
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Results:
    """The results of a run in its folder, set by set.

    Args:
        folder: of the run; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sets: dict[str, dict[str, Any]] = {}

    def begin(self, name: str, entry: SuiteEntry) -> None:
        """A set's turn has come."""
        self.sets[name] = {
            "status": "done",
            "reason": "",
            "how_to_get": entry.how_to_get,
            "note": entry.note,
            "metric": entry.metric,
            "paper": entry.paper,
            "splits": {},
            "tasks": {},
        }

    def say(self, name: str, **values: Any) -> None:
        """What is known of a set beside its tasks' results."""
        self.sets[name] |= values

    def known(self, name: str, task: Task, wanted: str) -> dict[str, Any] | None:
        """The result of an earlier run with the same :func:`recipe`."""
        try:
            saved = json.loads(self._file(name).read_text(encoding="utf-8"))[task]
            usable = saved["recipe"] == wanted and isinstance(saved["result"], dict)
            return saved["result"] if usable else None
        except (OSError, ValueError, KeyError, TypeError):  # none, or a file that somebody has damaged
            return None

    def add(self, name: str, task: Task, made: str, result: Mapping[str, Any]) -> None:
        """Keep a result, on disk too."""
        self.sets[name]["tasks"][task] = dict(result)
        path = self._file(name)
        try:
            path.parent.mkdir(exist_ok=True)
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            saved = {}
        saved = {**(saved if isinstance(saved, dict) else {}), task: {"recipe": made, "result": result}}
        with replacing(path) as draft:
            draft.write_text(json.dumps(saved), encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.folder / "sets" / f"{name}.json"

    def write(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``results.json`` and return what it says."""
        everything = {**head, "sets": self.sets}
        with replacing(self.folder / "results.json") as draft:
            draft.write_text(json.dumps(everything, indent=1, ensure_ascii=False), encoding="utf-8", errors="replace")
        return everything


def read_results(path: Path) -> dict[str, Any]:
    """The ``results.json`` of another run, or that in its folder.

    Raises:
        InputError: it is not one.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable results.json ({error})") from error
    if not isinstance(results, dict) or not isinstance(results.get("sets"), dict) or "model" not in results:
        raise InputError(f"{path}: not the results.json of lit-clip evaluate")
    try:  # what the report will ask of it, hours later
        rows(results)
        for _, entry in sets_of(results):
            shots_of(entry)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the results.json of lit-clip evaluate, or damaged ({error})") from error
    return results
