"""Features on disk, never half-written: in an index, in finished parts, and in the output of ``lit-clip embed``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_clip.embedding.parts import Arrays, json_array, json_value
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import reading

CHECKED_AT_ONCE = 65_536  # rows of a file of features
LENGTH_TOLERANCE = 0.01  # of unit features; bfloat16 rounds to 0.004
DIGEST = "features_sha256"  # beside the keys of a .npy file
WRITE_AGAIN = "write it with lit-clip embed"

Identity = tuple[str, int, int]  # key, and a file's size and modification time


@dataclass(frozen=True)
class FeatureTable:
    """Features of items; an identity says which version of an item was encoded."""

    identities: list[Identity]  # of N items
    features: np.ndarray  # float32 [N, D], of unit length
    unreadable: Sequence[UnreadableRow] = ()  # other items, where the table is of all that could be read

    def arrays(self) -> Arrays:
        """Return the content of a file."""
        return {"identities": json_array(self.identities), "features": self.features}

    @classmethod
    def of(cls, arrays: Arrays) -> "FeatureTable":
        """Restore a table from :meth:`arrays`."""
        return cls(
            [(key, size, modified) for key, size, modified in json_value(arrays["identities"])], arrays["features"]
        )


def collect(identities: Sequence[Identity], tables: Iterable[FeatureTable]) -> FeatureTable:
    """Return a table of the items that have a feature, in the given order."""
    features: dict[Identity, np.ndarray] = {}
    for table in tables:
        features.update(zip(table.identities, table.features, strict=True))
    present = [identity for identity in identities if identity in features]
    rows = np.empty((len(present), len(features[present[0]]) if present else 0), dtype=np.float32)
    for row, identity in enumerate(present):
        rows[row] = features[identity]
    return FeatureTable(present, rows)


def check_output(path: Path, suffixes: Sequence[str] = (".parquet", ".npy"), option: str = "--output") -> None:
    """Raise :class:`InputError` unless a file with one of these suffixes can be written there."""
    require(path.suffix in suffixes, f"{option} {path}: must be a {' or '.join(suffixes)} file")
    require(path.absolute().parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")


def check_keys(path: Path, keys: Iterable[str]) -> None:
    """Raise :class:`InputError` if the file cannot hold a key: file names need not be Unicode."""
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
    images: Sequence[str] | None = None,
) -> None:
    """Write features ``[N, D]`` and their keys; optionally the captions they belong to, or an image of each.

    A ``.parquet`` file has the columns ``key``, ``caption`` and ``image`` (strings), the latter if they are given, and
    ``feature`` (D float32 numbers), and the metadata in its schema. A ``.npy`` file is only the array; metadata, the
    SHA-256 of its numbers and the lists ``keys``, ``captions`` and ``images`` are beside it, in ``<name>.keys.json``.
    """
    given = {"key": keys, "caption": captions, "image": images}
    lists = {name: list(texts) for name, texts in given.items() if texts is not None}
    if path.suffix == ".npy":
        listed = {f"{name}s": texts for name, texts in lists.items()}
        digest = sha256(np.ascontiguousarray(features).data).hexdigest()
        with replacing(path.with_suffix(".keys.json")) as names, replacing(path) as temporary:
            names.write_text(json.dumps({**metadata, DIGEST: digest, **listed}, indent=0), encoding="utf-8")
            with temporary.open("wb") as file:
                np.save(file, features)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    columns = {name: pa.array(texts, type=pa.string()) for name, texts in lists.items()}
    table = pa.table({**columns, "feature": column}).replace_schema_metadata(dict(metadata))
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


class StoredFeatures(NamedTuple):
    """Content of a file from :func:`write_features`."""

    keys: list[str]  # of N rows; those of captions repeat their image's
    features: np.ndarray  # float32 [N, D], of unit length
    captions: list[str]  # that the features are of; empty if they are of images or of the keys
    images: list[str]  # an image of each row to show; empty if the keys are images, or there are none
    metadata: dict[str, str]  # such as the model and its SHA-256

    @property
    def made_by(self) -> dict[str, str]:
        """Fingerprints of the encoders that made the features, or of the whole model if no encoder is named."""
        names = [name for name in ("image_sha256", "text_sha256") if name in self.metadata] or ["model_sha256"]
        return {name: self.metadata.get(name, "") for name in names}


def read_features(path: Path, whole: bool = True) -> StoredFeatures:
    """Read a file of :func:`write_features`; unless ``whole``, a ``.npy`` file's features are read when used."""
    stored = _read_array(path) if path.suffix == ".npy" else _read_parquet(path)
    lists = {"keys": stored.keys, "captions": stored.captions or stored.keys, "images": stored.images or stored.keys}
    for name, texts in lists.items():
        complete = isinstance(texts, list) and len(texts) == len(stored.features)
        if not complete or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: its {name} are not {len(stored.features)} texts; {WRITE_AGAIN}")
    expected, found = stored.metadata.pop(DIGEST, None), sha256()
    for start in range(0, len(stored.features) if whole else 0, CHECKED_AT_ONCE):
        rows = np.ascontiguousarray(stored.features[start : start + CHECKED_AT_ONCE])
        found.update(rows.data if expected else b"")
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(rows, axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= LENGTH_TOLERANCE))  # NaN too
        if len(wrong):
            row, length = start + int(wrong[0]), lengths[wrong[0]]
            words = f"have length {length:.3g}, not 1" if np.isfinite(length) else "are not finite"
            raise InputError(f"{path}: row {row} ({stored.keys[row]}): its features {words}; {WRITE_AGAIN}")
    same = not whole or expected in (None, found.hexdigest())
    require(same, f"{path}: {path.with_suffix('.keys.json').name} is of other features; {WRITE_AGAIN}")
    return stored


def _read_array(path: Path) -> StoredFeatures:
    with reading(path, "file of features", hint=WRITE_AGAIN):
        features = np.lib.format.open_memmap(path, mode="r")  # np.load advises to trust what it does not know
        if features.dtype != np.float32 or features.ndim != 2:
            raise ValueError(f"{features.dtype} {list(features.shape)} in place of float32 [N, D]")
    names = path.with_suffix(".keys.json")
    with reading(names, "list of keys", hint=WRITE_AGAIN):
        listed = json.loads(names.read_text(encoding="utf-8"))
        keys, captions, images = listed.pop("keys"), listed.pop("captions", []), listed.pop("images", [])
        other = next((name for name, value in listed.items() if not isinstance(value, str)), None)
        if other is not None:
            raise ValueError(f"its {other} is no text")
    return StoredFeatures(keys, features, captions, images, listed)


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
        names = table.column_names
        captions, images = (table[name].to_pylist() if name in names else [] for name in ("caption", "image"))
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        return StoredFeatures(table["key"].to_pylist(), features, captions, images, metadata)
