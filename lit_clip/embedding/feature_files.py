"""Features on disk: the finished parts of a run, and its output; neither is ever half-written."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from lit_clip.embedding.precision import Precision
from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import not_written, replacing
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from lit_clip.training.lightning.folder_locks import claim, release_folders

CHECKED_AT_ONCE = 65_536  # rows of a file of features
LENGTH_TOLERANCE = 0.01  # of unit features; bfloat16 rounds to 0.004
WRITE_AGAIN = "write it with lit-clip embed"

Identity = tuple[str, int, int]  # key, and a file's size and modification time


@dataclass(frozen=True)
class FeatureTable:
    """Features of items, by the identities that these had when they were encoded.

    Attributes:
        identities: of N items.
        features: float32 ``[N, D]``, of unit length.
    """

    identities: list[Identity]
    features: np.ndarray

    def save(self, path: Path, model: str) -> None:
        """Write an ``.npz`` file.

        Args:
            path: the file.
            model: the model's :func:`lit_clip.weights.fingerprint.fingerprint`, and whatever else features depend on.
        """
        keys, sizes, modified = zip(*self.identities, strict=True) if self.identities else ((), (), ())
        columns = {
            "keys": np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8),  # an array of str would be padded
            "sizes": np.array(sizes, dtype=np.int64),
            "modified": np.array(modified, dtype=np.int64),
            "features": self.features,
            "model": np.array(model),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **columns, digest=np.array(_digest(columns)))

    @classmethod
    def load(cls, path: Path, model: str) -> "FeatureTable | None":
        """Read a table; None if it is missing, damaged or of another model, and so has to be made again."""
        try:
            with reading(path, "table of features"), np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
                if columns.pop("digest") != _digest(columns) or str(columns["model"]) != model:
                    return None
                keys = json.loads(columns["keys"].tobytes())
                identities = list(zip(keys, columns["sizes"].tolist(), columns["modified"].tolist(), strict=True))
                return cls(identities, columns["features"])
        except InputError:
            return None


def _digest(columns: Mapping[str, np.ndarray]) -> str:
    """Hash a table's arrays with their names, types and shapes."""
    parts = ((name, str(array.dtype), array.shape, array.tobytes()) for name, array in sorted(columns.items()))
    return hex_digest(part for each in parts for part in each)


class FeatureParts:
    """Finished features of an unfinished output, in a hidden folder beside it; the next run resumes with them.

    Args:
        output: the file that they will become.
        model: see :meth:`FeatureTable.save`.
    """

    def __init__(self, output: Path, model: str) -> None:
        self.folder = output.with_name(f".{output.name.lstrip('.')}.parts")
        self.model = model
        self.output_of_one = ""  # the output, if no other run may write it at the same time

    @classmethod
    def resumed(cls, output: Path, models: Mapping[Precision, str], precision: Precision) -> Self:
        """Return the parts of an output of one run at a time, those of an earlier run too, but of no other precision.

        Args:
            output: the file that they will become.
            models: by precision.
            precision: of this run.
        """
        parts = cls(output, models[precision])
        parts.output_of_one = str(output)
        begun = parts.models()
        for other, model in models.items():
            require(
                other == precision or model not in begun,
                f"--precision {precision}: the unfinished {output} was begun in {other}; give that, or remove "
                f"{parts.folder}",
            )
        return parts

    @property
    def stop(self) -> Path:
        """File whose existence tells every rank that one of them met an image that ends the run."""
        return self.folder / "stop"

    def start(self) -> None:
        """Make the folder and remove an earlier run's :attr:`stop`; for one rank to call."""
        if self.output_of_one and (holder := claim(self.folder / "run")):
            raise InputError(
                f"{self.output_of_one}: another run writes it ({holder}); wait for its end, or give another --output"
            )
        try:
            self.folder.mkdir(exist_ok=True)
            self.stop.unlink(missing_ok=True)
        except OSError as error:
            raise not_written(self.folder, error) from error

    def add(self, table: FeatureTable) -> None:
        """Write a part."""
        self.folder.mkdir(exist_ok=True)  # another run with the same output may have removed it
        table.save(self.folder / f"{uuid.uuid4().hex}.npz", self.model)

    def models(self) -> set[str]:
        """Return the ``model`` of each part, this run's or not."""
        found: set[str] = set()
        for path in self.folder.glob("*.npz"):
            with suppress(InputError), reading(path, "table of features"), np.load(path, allow_pickle=False) as file:
                found.add(str(file["model"]))
        return found

    def tables(self) -> Iterator[FeatureTable]:
        """Yield the parts, one at a time."""
        for path in sorted(self.folder.glob("*.npz")):
            table = FeatureTable.load(path, self.model)
            if table is not None:
                yield table

    def read(self) -> dict[Identity, np.ndarray]:
        """Return the feature ``[D]`` of each finished item by its identity."""
        finished: dict[Identity, np.ndarray] = {}
        for table in self.tables():
            finished.update(zip(table.identities, table.features, strict=True))
        return finished

    def finished(self) -> set[Identity]:
        """Return the identities that need not be encoded again."""
        return {identity for table in self.tables() for identity in table.identities}

    def end(self) -> None:
        """End an unfinished run: keep the parts, but no empty folder."""
        self._release()
        self.stop.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def remove(self) -> None:
        """Remove the parts when the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self.output_of_one:
            release_folders()


def collect(identities: Sequence[Identity], features: Mapping[Identity, np.ndarray], embed_dim: int) -> FeatureTable:
    """Return the table of those items that have a feature, in their order."""
    present = [identity for identity in identities if identity in features]
    rows = np.empty((len(present), embed_dim), dtype=np.float32)
    for row, identity in enumerate(present):
        rows[row] = features[identity]
    return FeatureTable(present, rows)


def check_output(path: Path) -> None:
    """Raise :class:`InputError` unless features can be written there."""
    if path.suffix not in (".parquet", ".npy"):
        raise InputError(f"--output {path}: must be a .parquet or .npy file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")


def check_keys(path: Path, keys: Iterable[str]) -> None:
    """Raise :class:`InputError` if a key cannot be written there: file names need not be Unicode."""
    for key in keys if path.suffix == ".parquet" else ():
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}: the file name {key!r} is not Unicode; rename the file") from error


def write_features(
    path: Path,
    keys: Sequence[str],
    features: np.ndarray,
    metadata: Mapping[str, str],
    captions: Sequence[str] | None = None,
) -> None:
    """Write features ``[N, D]``, their keys, and the captions that they are of, if any.

    A ``.parquet`` file has the columns ``key`` (string), ``caption`` (string) if there are captions, and ``feature`` (D
    float32 numbers), and the metadata in its schema. A ``.npy`` file is only the array; metadata and the lists ``keys``
    and ``captions`` are beside it, in ``<name>.keys.json``.
    """
    if path.suffix == ".npy":
        listed = {"keys": list(keys)} | ({"captions": list(captions)} if captions is not None else {})
        with replacing(path.with_suffix(".keys.json")) as names, replacing(path) as temporary:
            names.write_text(json.dumps({**metadata, **listed}, indent=0), encoding="utf-8")
            with temporary.open("wb") as file:
                np.save(file, features)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    texts = {} if captions is None else {"caption": pa.array(list(captions), type=pa.string())}
    columns = {"key": pa.array(list(keys), type=pa.string()), **texts, "feature": column}
    table = pa.table(columns).replace_schema_metadata(dict(metadata))
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


class StoredFeatures(NamedTuple):
    """Content of a file that :func:`write_features` wrote.

    Attributes:
        keys: of N rows.
        features: float32 ``[N, D]``, of unit length.
        captions: that the features are of; empty if they are of images or of the keys.
        metadata: such as the model and its SHA-256.
    """

    keys: list[str]
    features: np.ndarray
    captions: list[str]
    metadata: dict[str, str]


def read_features(path: Path) -> StoredFeatures:
    """Read what :func:`write_features` wrote."""
    stored = _read_array(path) if path.suffix == ".npy" else _read_parquet(path)
    for texts, name in ((stored.keys, "keys"), (stored.captions or stored.keys, "captions")):
        whole = isinstance(texts, list) and len(texts) == len(stored.features)
        if not whole or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: its {name} are not {len(stored.features)} texts; {WRITE_AGAIN}")
    for start in range(0, len(stored.features), CHECKED_AT_ONCE):
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(stored.features[start : start + CHECKED_AT_ONCE], axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= LENGTH_TOLERANCE))  # NaN too
        if len(wrong):
            row, length = start + int(wrong[0]), lengths[wrong[0]]
            found = f"have length {length:.3g}, not 1" if np.isfinite(length) else "are not finite"
            raise InputError(f"{path}: row {row} ({stored.keys[row]}): its features {found}; {WRITE_AGAIN}")
    return stored


def _read_array(path: Path) -> StoredFeatures:
    with reading(path, "file of features", hint=WRITE_AGAIN):
        features = np.lib.format.open_memmap(path, mode="r")  # np.load advises to trust what it does not know
        if features.dtype != np.float32 or features.ndim != 2:
            raise ValueError(f"{features.dtype} {list(features.shape)} in place of float32 [N, D]")
    names = path.with_suffix(".keys.json")
    with reading(names, "list of keys", hint=WRITE_AGAIN):
        listed = json.loads(names.read_text(encoding="utf-8"))
        keys, captions = listed.pop("keys"), listed.pop("captions", [])
        other = next((name for name, value in listed.items() if not isinstance(value, str)), None)
        if other is not None:
            raise ValueError(f"its {other} is no text")
    return StoredFeatures(keys, features, captions, listed)


def _read_parquet(path: Path) -> StoredFeatures:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path, "file of features", hint=WRITE_AGAIN):
        table = pq.read_table(path)
        table.validate(full=True)
        column = table["feature"].combine_chunks()
        if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32():
            raise ValueError(f"its column feature holds {column.type}")
        features = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        captions = table["caption"].to_pylist() if "caption" in table.column_names else []
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        return StoredFeatures(table["key"].to_pylist(), features, captions, metadata)
