"""Images that Pillow cannot read: arrays in ``.npy`` files, TIFF files of bands (by tifffile), DICOM (by pydicom)."""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from lit_clip.errors import BadSample, InputError
from lit_clip.tools.guarded_output import log_level
from lit_clip.tools.levels import (
    MOST_BANDS,
    WHOLE,
    Levels,
    Window,
    as_bytes,
    check_bands,
    check_count,
    levels_of,
    scaled,
)
from lit_clip.tools.reading import reason

MOST_BYTES = 2**31  # of a TIFF file and of its pixels
MOST_COMPRESSED = 1032  # bytes of pixels for each byte of a strip or tile, as in deflate at most
LZW = 5
UNPACKED = (1, LZW, 8, 32773, 32946)  # TIFF compressions: none, LZW, deflate, packbits, an older deflate
PREAMBLE, MARK = 128, b"DICM"
DEFLATED = "1.2.840.10008.1.2.1.99"  # a transfer syntax: the file is unpacked before any number in it can be checked
MOST_COMPRESSED_DICOM = 1000  # bytes of pixels for each byte of the file, as in a PNG of one colour


def banded(values: np.ndarray, where: str = "an array") -> Image.Image:
    """Return numbers ``[H, W]`` or ``[H, W, C]`` as an image that shows the first bands and keeps all."""
    _check(values.shape, values.dtype)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    values = values[..., 0] if values.shape[2:] == (1,) else values
    bits = 8 * values.dtype.itemsize if values.dtype in (np.uint8, np.uint16) else None
    levels = Levels(values, bits, False, where)
    first = values[..., :3] if values.shape[2:] >= (3,) else np.atleast_3d(values)[..., 0]
    shown: Any = Image.fromarray(as_bytes(levels._replace(values=first), None if bits else WHOLE))
    shown.where = where
    if bits != 8 or values.shape[2:] not in ((), (3,)):  # which it shows already
        shown.levels = levels
    return shown


def _check(shape: Sequence[int], dtype: np.dtype) -> None:
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ValueError(f"its values are {dtype}; they must be integers or floats")
    if len(shape) not in (2, 3) or min(shape) < 1 or max(shape[2:], default=1) > MOST_BANDS:
        raise ValueError(f"an array {list(shape)}; it must be [height, width] or [height, width, bands]")


class ArrayFile(ImageFile.ImageFile):
    """An array in an ``.npy`` file; objects are refused, and shapes larger than the file."""

    format, format_description = "NPY", "NumPy array"
    levels: Levels | None = None
    deep = False  # whether its numbers have more than 8 bits

    def _open(self) -> None:
        shape, dtype = self._header()
        _check(shape, dtype)
        self._size, self.deep = (shape[1], shape[0]), dtype.itemsize > 1
        self._mode = "RGB" if shape[2:] >= (3,) else "L"

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        """Return shape and type of the array; raise ``ValueError`` if the file cannot hold it."""
        file: Any = self.fp
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of .npy; write it with numpy.save")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        held = file.seek(0, io.SEEK_END) - start
        if math.prod(shape) * dtype.itemsize > held:
            raise ValueError(f"it claims an array {list(shape)} of {dtype}, more than its {held:,} bytes hold")
        return shape, dtype

    def _values(self) -> np.ndarray:
        file: Any = self.fp
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)

    def load(self) -> Any:
        if self._im is None:
            shown = banded(self._values())
            self.im, self.levels = shown.im, levels_of(shown)
        return Image.Image.load(self)


class TiffBands(ArrayFile):
    """A TIFF file that Pillow cannot read, such as four bands of 16 bits, or floats."""

    format, format_description = "TIFF", "TIFF file of bands"

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        with _pages(self.fp) as (first, *others):
            return (first.imagelength, first.imagewidth, first.samplesperpixel * (1 + len(others))), first.dtype

    def _values(self) -> np.ndarray:
        return tiff_values(self.fp)


def tiff_values(source: Any, wanted: int | None = None, where: str = "an image") -> np.ndarray:
    """Read ``wanted`` bands of a TIFF file, given as a path or open file, ``[H, W, C]``."""
    with _pages(source) as pages:
        check_bands(pages[0].samplesperpixel * len(pages), wanted, where)  # before they are decoded
        values = np.stack([page.asarray(maxworkers=1) for page in pages])
        return values[0] if pages[0].axes == "YXS" else np.moveaxis(values.reshape(-1, *values.shape[-2:]), 0, -1)


@contextmanager
def _pages(source: Any) -> Iterator[list[Any]]:
    """Open the pages with a TIFF file's bands: the first page, or if it has one band, all pages of its size."""
    try:
        from tifffile import TiffFile  # an extra
    except ImportError as error:
        raise InputError("a TIFF file of such bands needs tifffile: pip install tifffile") from error
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        file.seek(0)
        content = file.read()
    # From memory no count in the file reads more than there is, and no name in it finds another file.
    with log_level(logging.CRITICAL, "tifffile"), TiffFile(io.BytesIO(content)) as tiff:
        pages: list[Any] = list(islice(tiff.pages, MOST_BANDS))
        first = pages[0]
        alike = [page for page in pages if (page.shape, page.dtype) == (first.shape, first.dtype)]
        pages = alike if first.samplesperpixel == 1 else [first]
        parts: dict[int, int] = {}  # bytes by their start, as pages may share strips
        for page in pages:
            _check_page(page, len(content))
            parts.update(zip(page.dataoffsets, page.databytecounts, strict=True))
        held = min(len(content), sum(parts.values())) * (MOST_COMPRESSED if first.compression != 1 else 1)
        claimed = sum(max(page.nbytes, math.prod(page.chunks) * page.dtype.itemsize) for page in pages)
        if claimed > min(MOST_BYTES, held):
            raise ValueError(f"it claims {len(pages)} x {first.shape} values, more than {len(content):,} bytes hold")
        yield pages


def _check_page(page: Any, size: int) -> None:
    """Raise ``ValueError`` for a page without bands, and for parts that are too large or outside the file."""
    bits = page.dtype and 8 * page.dtype.itemsize
    bands = page.axes in ("YX", "YXS", "SYX") and page.photometric in (1, 2)
    if not bands or page.bitspersample != bits or page.compression not in UNPACKED:
        raise ValueError("a TIFF file of another kind than bands of whole bytes, uncompressed or by deflate")
    if page.compression == LZW and find_spec("imagecodecs") is None:
        needs = "a TIFF file of bands compressed by LZW needs imagecodecs: pip install imagecodecs"
        raise InputError(f"{needs}, or write the file uncompressed or by deflate")
    if max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > size:
        raise ValueError(f"it claims {page.imagewidth} x {page.imagelength} pixels, more than its {size:,} bytes hold")
    if page.compression != 1 and max(page.databytecounts) * MOST_COMPRESSED > MOST_BYTES:
        raise ValueError("compressed parts of more than 2 MB; write smaller strips or tiles")


def tiff_bands(image: Image.Image, wanted: int) -> Image.Image:
    """Return a TIFF file's image with all bands and bits; Pillow may have dropped or changed some."""
    source, where = getattr(image, "source", None), getattr(image, "where", "an image")
    try:
        return image if source is None else banded(tiff_values(source, wanted, where), where)
    except InputError:  # another number of bands, or a package is missing
        raise
    except Exception as error:  # as of Pillow's decoders
        raise BadSample(where, "broken image", f"cannot read its bands ({reason(error)})") from error


def eight_bit_bands(image: Image.Image, wanted: int, window: Window | None) -> np.ndarray:
    """Return ``wanted`` bands of an image's file, scaled to 8 bits by a window, uint8 ``[H, W, C]``."""
    image = tiff_bands(image, wanted)
    check_count(image, wanted)
    levels = levels_of(image)
    values = np.asarray(image.convert("L") if wanted == 1 else image) if levels is None else as_bytes(levels, window)
    return values.reshape(*values.shape[:2], wanted)


class DicomFile(ImageFile.ImageFile):
    """Grey or coloured pixels of a DICOM file; only the first of several frames."""

    format, format_description = "DICOM", "Digital Imaging and Communications in Medicine"
    levels: Levels | None = None
    is_animated = deep = False  # deep: more than 8 bits without a window of its own
    header: Any

    def _open(self) -> None:
        file: Any = self.fp
        if file.read(PREAMBLE + len(MARK))[PREAMBLE:] != MARK:
            raise SyntaxError("no DICOM file")
        try:
            from pydicom import dcmread  # an extra
            from pydicom.filereader import read_dataset
        except ImportError as error:
            raise InputError("DICOM files need pydicom: pip install pydicom") from error
        with warnings.catch_warnings(action="ignore"):
            meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
            if meta.TransferSyntaxUID == DEFLATED:
                raise ValueError("a deflated DICOM file; write it with another transfer syntax")
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            self.header = header = dcmread(file, stop_before_pixels=True)
        names = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
        rows, columns, samples, bits = (int(header[name].value) for name in names)
        most = size * (MOST_COMPRESSED_DICOM if meta.TransferSyntaxUID.is_compressed else 1)
        if rows * columns * samples * bits > 8 * most:
            raise ValueError(f"it claims {columns} x {rows} pixels, more than its {size:,} bytes hold")
        self._size = (columns, rows)
        self._mode = "L" if str(header.PhotometricInterpretation).startswith("MONOCHROME") else "RGB"
        self.is_animated = int(header.get("NumberOfFrames") or 1) > 1
        self.deep = self._mode == "L" and header.BitsStored > 8 and not self._windowed

    @property
    def _windowed(self) -> bool:
        numbers = (self.header.get("WindowCenter"), self.header.get("WindowWidth"))
        return bool(self.header.get("VOILUTSequence")) or None not in numbers

    def load(self) -> Any:
        if self._im is None:
            from pydicom.pixels.utils import pixel_array

            file: Any = self.fp
            file.seek(0)
            with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
                stored = pixel_array(file, index=0)
                if stored.shape[:2] != self._size[::-1]:
                    raise ValueError("its pixels are not of the size that it claims")
                shown = self._grey(stored) if self._mode == "L" else self._colours(stored)
            self.im = Image.fromarray(shown).im
        return Image.Image.load(self)

    def _grey(self, stored: np.ndarray) -> np.ndarray:
        """Return levels as the file's window shows them, ``[H, W]``; keep the levels in the file's units."""
        from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

        header = self.header
        values = apply_modality_lut(stored, header)
        if header.get("VOILUTSequence"):
            shown, low, high = apply_voi_lut(values, header), 0, 2 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1
        elif self._windowed:
            shown = apply_voi_lut(values, header)
            low, high = apply_voi_lut(np.array([-1e300, 1e300]), header)  # what becomes black and white
        else:
            bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
            whole = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], stored.dtype)
            shown, (low, high) = values, apply_modality_lut(whole, header)
        inverted = header.PhotometricInterpretation == "MONOCHROME1"
        self.levels = Levels(values, int(header.BitsStored), inverted, str(self.filename), self._windowed)
        result = scaled(shown, float(low), float(high))
        return 255 - result if inverted else result

    def _colours(self, stored: np.ndarray) -> np.ndarray:
        """Return 8-bit red, green and blue, ``[H, W, 3]``; pydicom converts other colour spaces."""
        from pydicom.pixels.processing import apply_color_lut

        bits = 8 * stored.dtype.itemsize
        if self.header.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, self.header)
            bits = 8 * stored.dtype.itemsize
        return np.ascontiguousarray(stored >> (bits - 8)).astype(np.uint8)[..., :3]
