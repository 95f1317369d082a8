"""DICOM files as a Pillow format, read by pydicom: with the file's window, and its levels for a model's window."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from lit_clip.errors import InputError
from lit_clip.tools.levels import Levels, scaled

PREAMBLE, MARK = 128, b"DICM"
DEFLATED = "1.2.840.10008.1.2.1.99"  # a transfer syntax: the file is unpacked before any number in it can be checked
MOST_COMPRESSED = 1000  # bytes of pixels for each byte of the file, as in a PNG of one colour


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
        most = size * (MOST_COMPRESSED if meta.TransferSyntaxUID.is_compressed else 1)
        if rows * columns * samples * bits > 8 * most:
            raise ValueError(f"it claims {columns} x {rows} pixels, more than its {size:,} bytes hold")
        self._size = (columns, rows)
        self._mode = "L" if str(header.PhotometricInterpretation).startswith("MONOCHROME") else "RGB"
        self.is_animated = int(header.get("NumberOfFrames") or 1) > 1
        self.deep = self._mode == "L" and header.BitsStored > 8 and not self._windowed

    @property
    def _windowed(self) -> bool:
        """Return whether the file has its own window, as two numbers or as a table."""
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


def register() -> None:
    """Register DICOM with Pillow, after all formats that Pillow recognises by their first bytes."""
    Image.preinit()
    Image.register_open("DICOM", DicomFile)
