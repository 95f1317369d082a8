"""Hashes of content: the same in every process and on every machine."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b, file_digest
from pathlib import Path

SAMPLED_FILES, SAMPLED_BYTES = 16, 2**16  # files whose beginning goes into a stamp, and bytes of each


def hash64(content: str | bytes) -> bytes:
    """Return a 64-bit hash: the odds of a collision among a million contents are 3e-8, among 100 million 0.03 %."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content  # names need not be text
    return blake2b(data, digest_size=8).digest()


def stable_hash(text: str) -> int:
    """Return :func:`hash64` as a signed integer."""
    return int.from_bytes(hash64(text), "big", signed=True)


def pair_hash(key: str, caption: str) -> int:
    """Return a 64-bit hash of an image's key and a caption."""
    return stable_hash(f"{key}\0{caption}")


def hex_digest(parts: Iterable[object]) -> str:
    """Return a 128-bit hash as 32 hexadecimal digits: of bytes directly, of other values by their ``repr``."""
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def stamp_of_files(paths: Iterable[Path]) -> str:
    """Hash the names, sizes and modification times of files, and the beginnings of a few.

    Times and sizes are not enough: archives can give all files one time, and uncompressed images have one size.
    """
    return hex_digest(_described(sorted(paths)))


def _described(files: Sequence[Path]) -> Iterator[object]:
    for path in files:
        status = path.stat()
        yield path.name, status.st_size, status.st_mtime_ns
    for number in sorted({len(files) * part // SAMPLED_FILES for part in range(SAMPLED_FILES)}) if files else ():
        with suppress(OSError), files[number].open("rb") as file:  # reading the set will report it
            yield file.read(SAMPLED_BYTES)
