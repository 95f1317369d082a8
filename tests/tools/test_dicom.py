"""DICOM files against pydicom's own tables and windows; claims of a file are compared with its size."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_clip.embedding.image_files import images_in
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import SUFFIXES, Unseen, image_size, open_image, unseen

pydicom: Any = pytest.importorskip("pydicom")  # the extra dicom

STORED = np.random.default_rng(0).integers(0, 4096, (40, 50)).astype(np.uint16)
HOUNSFIELD = {"RescaleSlope": 2, "RescaleIntercept": -1024}
TABLE = {"LUTDescriptor": [4096, 0, 10], "LUTData": [int(1023 * (level / 4095) ** 2) for level in range(4096)]}


def dicom(stored: np.ndarray = STORED, syntax: str = "ExplicitVRLittleEndian", **entries: Any) -> bytes:
    """Write a file with pydicom, 12 bits of 16 if not said otherwise."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = "1.2.3"
    header.Rows, header.Columns = stored.shape[:2]
    header.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    header.PhotometricInterpretation = "RGB" if stored.ndim == 3 else "MONOCHROME2"
    if stored.ndim == 3:
        header.PlanarConfiguration = 0
    bits = 8 * stored.dtype.itemsize
    header.BitsAllocated, header.BitsStored = bits, min(12, bits)
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.PixelData = stored.tobytes()
    header["PixelData"].VR = "OW"
    for name, value in entries.items():
        if name.endswith("Sequence"):
            item = Dataset()
            item.LUTDescriptor, item.LUTData = value["LUTDescriptor"], value["LUTData"]
            item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
            value = Sequence([item])
        setattr(header, name, value)
    if syntax == "RLELossless":
        header.PixelData = None
        header.compress(pydicom.uid.RLELossless, stored)
    file = io.BytesIO()
    header.save_as(file, enforce_file_format=True)
    return file.getvalue()


def shown_by_pydicom(data: bytes) -> np.ndarray:
    """Apply pydicom's modality and VOI tables; black and white are the ends of what they can give."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    header = pydicom.dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header).astype(float)
    low, high = (-(2**11), 2**11 - 1) if header.PixelRepresentation else (0, 2**12 - 1)
    low, high = (
        level * float(header.get("RescaleSlope", 1)) + float(header.get("RescaleIntercept", 0)) for level in (low, high)
    )
    if "VOILUTSequence" in header:
        low, high = 0, 2**10 - 1
    share = (shown - low) / (high - low)
    return 255 * (1 - share if header.PhotometricInterpretation == "MONOCHROME1" else share)


CASES: dict[str, dict[str, Any]] = {
    "no window": {},
    "window": {"WindowCenter": 2000, "WindowWidth": 900},
    "several windows": {"WindowCenter": [2000, 100], "WindowWidth": [900, 50]},
    "inverted": {"WindowCenter": 2000, "WindowWidth": 900, "PhotometricInterpretation": "MONOCHROME1"},
    "inverted without a window": {"PhotometricInterpretation": "MONOCHROME1"},
    "Hounsfield units": {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400},
    "Hounsfield units without a window": HOUNSFIELD,
    "exact": {"WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    "table": {"VOILUTSequence": TABLE},
    "signed": {"stored": (STORED.astype(np.int16) - 2048), "WindowCenter": 0, "WindowWidth": 900},
    "compressed": {"syntax": "RLELossless", "WindowCenter": 2000, "WindowWidth": 900},
    "implicit": {"syntax": "ImplicitVRLittleEndian", "WindowCenter": 2000, "WindowWidth": 900},
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_own_window_is_pydicoms(name: str) -> None:
    data = dicom(**CASES[name])
    image = open_image(io.BytesIO(data))
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - shown_by_pydicom(data)).max() <= 0.5 + 1e-6
    windowed = "without" not in name and name != "no window"
    assert (Unseen.DEEP in unseen(io.BytesIO(data), "")) != windowed


def test_a_models_window_is_in_the_files_units_and_wins() -> None:
    data = dicom(**HOUNSFIELD, WindowCenter=40, WindowWidth=400)
    found = pixels(Preprocessing((40, 50), window=[-160, 240]))(open_image(io.BytesIO(data)))
    expected = np.rint(255 * np.clip((STORED * 2.0 - 1024 + 160) / 400, 0, 1))
    assert np.abs(found[0].numpy() - expected).max() <= 1
    own = pixels(Preprocessing((40, 50), window="bit_depth"))(open_image(io.BytesIO(data)))
    assert np.array_equal(own[0].numpy(), np.asarray(open_image(io.BytesIO(data))))


def test_colours_and_frames() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(io.BytesIO(dicom(colours)))), colours)
    frames = np.stack([STORED, STORED // 2])
    data = dicom(
        frames, Rows=40, Columns=50, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", NumberOfFrames=2
    )
    assert np.abs(np.asarray(open_image(io.BytesIO(data))) - STORED / 4095 * 255).max() <= 0.5 + 1e-6
    assert Unseen.ANIMATED in unseen(io.BytesIO(data), "")


def test_they_are_listed_by_their_suffix(tmp_path: Path) -> None:
    assert ".dcm" in SUFFIXES
    (tmp_path / "a.dcm").write_bytes(dicom())
    assert [file.key for file in images_in(tmp_path)] == ["a.dcm"]
    assert image_size(tmp_path / "a.dcm", "") == (50, 40)


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "RLELossless"])
def test_a_size_that_the_file_cannot_hold_is_refused_before_memory_is_taken(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dicom(syntax=syntax)
    header = pydicom.dcmread(io.BytesIO(data))
    header.Rows, header.Columns = 10_000, 12_000
    file = io.BytesIO()
    header.save_as(file)
    monkeypatch.setattr("pydicom.pixels.pixel_array", None)
    with pytest.raises(BadSample, match="claims 12000 x 10000 pixels, more than its"):
        open_image(file)


@pytest.mark.parametrize("end", [0.2, 0.5, 0.9])
def test_a_file_that_is_cut_is_a_bad_sample(end: float) -> None:
    data = dicom()
    with pytest.raises(BadSample):
        open_image(io.BytesIO(data[: int(len(data) * end)]))


def test_a_deflated_file_is_not_unpacked() -> None:
    with pytest.raises(BadSample, match="deflated"):
        open_image(io.BytesIO(dicom(syntax="DeflatedExplicitVRLittleEndian")))


def test_without_the_package_a_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match="pip install pydicom") as refused:
        open_image(tmp_path / "a.dcm")
    assert not isinstance(refused.value, BadSample)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (4, 4)
