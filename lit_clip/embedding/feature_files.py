"""Features on disk: what is finished, what a user takes away, and neither ever half-written."""

import json
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_clip.embedding.image_files import Item
from lit_clip.errors import InputError
from lit_clip.tools.atomic import replacing

Identity = tuple[str, int, int]


@dataclass(frozen=True)
class FeatureTable:
    """Unit features of items, by what they were when they were encoded.

    Attributes:
        identities: N of :attr:`lit_clip.embedding.image_files.Item.identity`.
        features: float32 ``[N, D]``.
    """

    identities: list[Identity]
    features: np.ndarray

    def save(self, path: Path, model: str) -> None:
        """Write an ``.npz`` file; ``model`` is a :func:`fingerprint`."""
        keys, sizes, modified = zip(*self.identities, strict=True) if self.identities else ((), (), ())
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                keys=np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8),  # an array of str would pad them all
                sizes=np.array(sizes, dtype=np.int64),
                modified=np.array(modified, dtype=np.int64),
                features=self.features,
                model=np.array(model),
            )

    @classmethod
    def load(cls, path: Path, model: str) -> "FeatureTable | None":
        """The table of that model, or None: not there, of another model, or unreadable (then it is made again)."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["model"]) != model:
                    return None
                keys, sizes, modified = json.loads(file["keys"].tobytes()), file["sizes"], file["modified"]
                return cls(list(zip(keys, sizes.tolist(), modified.tolist(), strict=True)), file["features"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


class FeatureParts:
    """Finished features of an unfinished output, in a hidden folder beside it; a second run goes on from them.

    Args:
        output: the file that they will become.
        model: the model's :func:`fingerprint` and whatever else the features depend on.
    """

    def __init__(self, output: Path, model: str) -> None:
        self.folder = output.with_name(f".{output.name.lstrip('.')}.parts")
        self.model = model

    @property
    def stop(self) -> Path:
        """Tells every rank that one of them met an image that ends the run."""
        return self.folder / "stop"

    def start(self) -> None:
        """Make the folder, and forget what ended an earlier run; call it on one rank."""
        try:
            self.folder.mkdir(exist_ok=True)
            self.stop.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder.parent}: files cannot be written here ({error.strerror})") from error

    def add(self, table: FeatureTable) -> None:
        """Write a part, whole or not at all."""
        self.folder.mkdir(exist_ok=True)  # another run with the same output may have ended and removed it
        table.save(self.folder / f"{uuid.uuid4().hex}.npz", self.model)

    def tables(self) -> Iterator[FeatureTable]:
        """The parts that there are, one at a time."""
        for path in sorted(self.folder.glob("*.npz")):
            table = FeatureTable.load(path, self.model)
            if table is not None:
                yield table

    def read(self) -> dict[Identity, np.ndarray]:
        """Identity -> feature ``[D]`` of all finished items."""
        finished: dict[Identity, np.ndarray] = {}
        for table in self.tables():
            finished.update(zip(table.identities, table.features, strict=True))
        return finished

    def finished(self) -> set[Identity]:
        """What needs not be encoded again."""
        return {identity for table in self.tables() for identity in table.identities}

    def end(self) -> None:
        """The run ends unfinished: leave what can be gone on from, and no folder if that is nothing."""
        self.stop.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def remove(self) -> None:
        """The output is complete: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def collect(items: Sequence[Item], features: Mapping[Identity, np.ndarray], embed_dim: int) -> FeatureTable:
    """Those of the items that have a feature, in the items' order."""
    present = [item.identity for item in items if item.identity in features]
    rows = np.empty((len(present), embed_dim), dtype=np.float32)
    for row, identity in enumerate(present):
        rows[row] = features[identity]
    return FeatureTable(present, rows)


def check_output(path: Path) -> None:
    """Raise :class:`InputError` unless features can be written there, before anything is computed."""
    if path.suffix not in (".parquet", ".npy"):
        raise InputError(f"--output {path}: features go to a .parquet or a .npy file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")


def check_keys(path: Path, keys: Iterable[str]) -> None:
    """Raise :class:`InputError` if a key cannot be written there: a file's name need not be Unicode."""
    for key in keys if path.suffix == ".parquet" else ():
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}: the file name {key!r} is not Unicode text; rename the file") from error


def write_features(path: Path, keys: Sequence[str], features: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Write features ``[N, D]`` and their keys.

    A ``.parquet`` file has the columns ``key`` (string) and ``feature`` (D float32 numbers), and the metadata in its
    schema. A ``.npy`` file is the array alone; beside it lies ``<name>.keys.json``, which is the metadata and the list
    ``keys``.
    """
    if path.suffix == ".npy":
        with replacing(path.with_suffix(".keys.json")) as names, replacing(path) as temporary:
            names.write_text(json.dumps({**metadata, "keys": list(keys)}, indent=0), encoding="utf-8")
            with temporary.open("wb") as file:
                np.save(file, features)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    names = pa.array(list(keys), type=pa.string())
    table = pa.table({"key": names, "feature": column}).replace_schema_metadata(dict(metadata))
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
