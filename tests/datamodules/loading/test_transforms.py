"""Augmentation by a list of transforms, and fast decoding: which pixels reach the model, and what they depend on."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from datamodules import Augmentation, Captions
from datamodules.loading.augmentation import RandomSquareCrop, TrainingTransform
from datamodules.loading.sampling import TrainingSample
from datamodules.pairs.batches import TrainingPairs
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing, height_width
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import decoding_at_least, fraction, full_size, open_image
from tests.fuzz.samples import whole_images
from tests.helpers.epochs import batches_of, opened

SMALL = Preprocessing(image_size=24)
ROWS = 12


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Tint:
    """Adds a colour drawn by Python's and numpy's global generators, which torchvision never uses."""

    def __call__(self, image: Any) -> Any:
        red, green = random.randrange(60), int(np.random.randint(60))  # noqa: NPY002
        return Image.fromarray(np.asarray(image) // 2 + np.array([red, green, 0], np.uint8))


RANDOM: list[Any] = [v2.RandomResizedCrop(24), Tint(), v2.RandAugment()]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    for i in range(ROWS):
        noise(i, 40 + i, 30).save(folder / f"{i}.jpg")
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,photo {i}\n" for i in range(ROWS)))
    return folder / "t.csv"


def epoch(table: Path, number: int, world: int = 1, workers: int = 0) -> dict[str, Tensor]:
    """Return the pixels of an epoch's samples by key."""
    data = opened(table, val=str(table), batch_size=4 // world, num_workers=workers, augmentation=RANDOM)
    data.preprocessing = SMALL
    batches = [batch for rank in range(world) for batch in batches_of(data, number, rank, world)]
    return {key: image for batch in batches for key, image in zip(batch.keys, batch.images, strict=True)}


def test_pixels_depend_neither_on_workers_nor_on_ranks_whatever_generator_a_transform_draws_from(table: Path) -> None:
    expected = epoch(table, 1)
    assert len(expected) == ROWS
    for found in (epoch(table, 1), epoch(table, 1, workers=2), epoch(table, 1, world=2)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    other = epoch(table, 0)
    assert not any(torch.equal(other[key], expected[key]) for key in other)


def test_the_global_generators_are_left_as_they_were(table: Path) -> None:
    data = Captions(str(table), str(table), num_workers=0)
    data.setup("fit")
    assert data.train_source is not None
    pairs = TrainingPairs(data.train_source, TrainingTransform(RANDOM, SMALL), seed=0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for row in range(ROWS):
        pairs[TrainingSample(0, row)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


@pytest.mark.parametrize("image", [noise(1, 50, 31), noise(2, 24, 24), noise(3, 40, 60).convert("RGBA")])
def test_an_empty_list_is_evaluations_preprocessing(image: Image.Image) -> None:
    assert torch.equal(TrainingTransform([], SMALL)(image), pixels(SMALL)(image))


def test_a_result_of_the_models_size_is_kept_and_any_other_is_resized() -> None:
    image = noise(1, 50, 31)
    flipped = TrainingTransform([v2.RandomHorizontalFlip(1.0)], SMALL)(image)
    assert torch.equal(flipped, pixels(SMALL)(ImageOps.mirror(image)))
    cut = TrainingTransform([v2.CenterCrop(24)], SMALL)(image)
    assert torch.equal(cut, TF.pil_to_tensor(TF.center_crop(image, [24, 24])))


def to_float(image: Image.Image) -> Tensor:
    return TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)


@pytest.mark.parametrize(
    "transforms",
    [[], [v2.PILToTensor()], [v2.ToImage()], [to_float], [v2.ToImage(), v2.ToDtype(torch.float64, scale=True)]],
)
def test_pil_images_integer_and_float_tensors_give_the_same_pixels(transforms: list[Any]) -> None:
    image = noise(1, 24, 24)
    found = TrainingTransform(transforms, SMALL)(image)
    assert type(found) is Tensor
    assert torch.equal(found, TF.pil_to_tensor(image))


def test_grey_results_have_three_equal_channels() -> None:
    image = noise(1, 24, 24)
    expected = np.asarray(ImageOps.grayscale(image))
    for grey in (v2.Grayscale(), ImageOps.grayscale, v2.Compose([v2.PILToTensor(), v2.Grayscale(1)])):
        found = TrainingTransform([grey], SMALL)(image)
        assert np.abs(found.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_floats_that_overshoot_at_edges_are_clipped() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(4), (64, 8)))
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Resize((24, 24), v2.InterpolationMode.BICUBIC)]
    assert v2.Compose(steps)(stripes).min() < 0
    found = TrainingTransform(steps, SMALL)(stripes)
    assert found.min() == 0
    assert found.max() == 255


def standardise(image: Any) -> Tensor:
    floats = to_float(image)
    return (floats - floats.mean()) / floats.std()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (standardise, r"standardise, the last transform, returned values from -1\.\d+ to 1\.\d+; .* the model itself"),
        (lambda image: np.asarray(image), "returned a ndarray; it must return a PIL image or a tensor"),
        (v2.FiveCrop(8), "FiveCrop, the last transform, returned a tuple"),
        (lambda image: to_float(image).long(), "returned torch.int64; it must be uint8"),
        (lambda image: to_float(image)[None], r"a tensor \[1, 3, 24, 24\]; it must be \[3, H, W\]"),
        (lambda image: to_float(image) * torch.nan, "values from nan to nan"),
    ],
)
def test_results_that_are_no_image_are_refused_in_one_line(last: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        TrainingTransform([last], SMALL)(noise(1, 24, 24))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "listed",
    [
        [v2.Normalize([0.5], [0.5])],
        [v2.RandomResizedCrop(24), v2.Compose([v2.ToImage(), v2.RandomApply([v2.Normalize([0.5], [0.5])])])],
        ["torchvision.transforms.v2.RandAugment"],
    ],
)
def test_normalisation_and_what_cannot_be_called_are_refused_when_the_data_module_is_made(listed: Any) -> None:
    with pytest.raises(InputError, match=r"augmentation: (the model itself normalises|.* it cannot be called)"):
        Captions("t.csv", augmentation=listed)


# Our crop


def photograph(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    noise(4, 40, 30).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def draw(transform: TrainingTransform, data: bytes) -> tuple[Tensor, int]:
    """Return a sample's pixels, and the divisor at which it was decoded."""
    torch.manual_seed(3)
    with decoding_at_least(transform.decode_size):
        image = open_image(io.BytesIO(data), "")
    return transform(image), full_size(image)[2]


@pytest.mark.parametrize("exact", [False, True])
def test_our_crop_in_a_list_has_the_models_size_and_its_usual_pixels_and_speed(exact: bool) -> None:
    data = photograph((400, 300))
    usual = TrainingTransform(Augmentation((0.5, 1.0), grayscale=0.5, exact=exact), SMALL)
    listed = TrainingTransform([RandomSquareCrop((0.5, 1.0), exact=exact), v2.RandomGrayscale(0.5)], SMALL)
    (expected, divided), found = draw(usual, data), draw(listed, data)
    assert divided == (1 if exact else 8)
    assert torch.equal(found[0], expected)
    assert found[1] == divided


def test_images_are_decoded_whole_for_other_first_transforms() -> None:
    crop = RandomSquareCrop((0.5, 1.0))
    assert draw(TrainingTransform([v2.RandomHorizontalFlip(), crop], SMALL), photograph((400, 300)))[1] == 1


def test_our_crop_within_another_transform_asks_for_its_size() -> None:
    with pytest.raises(InputError, match="RandomSquareCrop: its size is only known in the list itself; set size"):
        TrainingTransform([v2.RandomApply([RandomSquareCrop()], 1.0)], SMALL)(noise(1, 30, 30))
    with pytest.raises(InputError, match="crops PIL images, not Tensor"):
        TrainingTransform([v2.PILToTensor(), RandomSquareCrop()], SMALL)(noise(1, 30, 30))


class Shifted:
    """Rolls the image by half of the model's size."""

    def __init__(self, by: int = 0) -> None:
        self.by = by

    def for_model(self, preprocessing: Preprocessing) -> "Shifted":
        return Shifted(height_width(preprocessing.image_size)[1] // 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(np.roll(np.asarray(image), self.by, axis=1))


def test_a_transform_of_ones_own_may_ask_for_the_models_size() -> None:
    image = noise(1, 24, 24)
    expected = TF.pil_to_tensor(image).roll(12, dims=2)
    assert torch.equal(TrainingTransform([Shifted()], SMALL)(image), expected)


@pytest.fixture(scope="module")
def temple() -> Image.Image:
    """A photograph, 640 x 427."""
    return Image.fromarray(load_sample_images().images[0])


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


# Crops


@pytest.mark.parametrize("size", [(1280, 960), (1281, 963), (1279, 957), (640, 481)])
def test_an_image_decoded_at_a_fraction_is_cropped_at_the_same_place(
    temple: Image.Image, size: tuple[int, int]
) -> None:
    """Also if the size is not a multiple of the divisor, so that the decoded image's last pixels cover less."""
    data = jpeg(temple.resize(size, Image.Resampling.BICUBIC))
    crop = RandomSquareCrop(exact=True, size=224, interpolation="bicubic")
    whole = open_image(io.BytesIO(data), "")
    with decoding_at_least(crop.least_size):
        part = open_image(io.BytesIO(data), "")
    factor = {1280: 4, 1281: 4, 1279: 4, 640: 2}[size[0]]
    assert full_size(part) == (*size, factor)
    assert full_size(whole) == (*size, 1)
    torch.manual_seed(0)
    for _ in range(20):
        params = crop.make_params([])
        assert tuple(factor * edge for edge in crop.box(part, params)) == crop.box(whole, params)
    one, other = (np.asarray(crop.transform(each, params), dtype=float) for each in (whole, part))
    assert np.abs(one - other).mean() < 4  # the photograph has edges everywhere
    for shifted in (one[:, 1:] - other[:, :-1], one[1:] - other[:-1], one[:, :-1] - other[:, 1:], one[:-1] - other[1:]):
        assert np.abs(shifted).mean() > 3 * np.abs(one - other).mean()


@pytest.mark.parametrize("size", [(224, 224), (100, 75), (500, 1), (1, 9), (1, 1), (225, 224), (3000, 17)])
@pytest.mark.parametrize("target", [16, 224, (32, 64)])
def test_a_crop_lies_inside_an_image_of_any_shape(size: tuple[int, int], target: Any) -> None:
    crop = RandomSquareCrop((0.1, 1.0), size=target, interpolation="bilinear")
    image = Image.new("RGB", size, (10, 20, 30))
    with decoding_at_least(crop.least_size):
        decoded = open_image(io.BytesIO(jpeg(image, quality=100, subsampling=0)), "")
    for place in (0.0, 0.49, 1.0):
        for side in (0.1**0.5, 1.0):
            params = {"side": side, "x": place, "y": place}
            left, top, right, bottom = crop.box(decoded, params)
            assert 0 <= left < right <= decoded.width
            assert 0 <= top < bottom <= decoded.height
            pixels = crop.transform(decoded, params)
            assert tuple(pixels.shape) == (3, *crop.size)
            assert (pixels.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)).abs().max() <= 2


def test_the_fraction_is_the_one_pillow_uses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height, wide, high = (int(each) for each in rng.integers(1, [300, 300, 90, 90]))
        least = (min(wide, width), min(high, height))
        with Image.open(io.BytesIO(jpeg(Image.new("RGB", (width, height))))) as image:
            image.draft("RGB", least)
            divided = fraction((width, height), least)
            assert image.size == (-(-width // divided), -(-height // divided))


# Pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(640, 427), (320, 240), (100, 75), (224, 224), (900, 800), (2000, 1500)])
def test_torch_resizing_equals_pillows_up_to_rounding(
    temple: Image.Image, size: tuple[int, int], interpolation: Any
) -> None:
    image = temple.resize(size, Image.Resampling.BICUBIC)
    plain, fast = (RandomSquareCrop((0.5, 1.0), exact, 224, interpolation) for exact in (True, False))
    for _ in range(3):
        params = plain.make_params([])
        expected = np.asarray(plain.transform(image, params), dtype=float)
        found = fast.transform(image, params)
        assert found.dtype == torch.uint8
        off = np.abs(found.permute(1, 2, 0).numpy() - expected)
        assert off.mean() < 0.2
    assert np.abs(np.diff(expected, axis=0)).mean() > 3


@pytest.mark.parametrize("name", [name for name in whole_images() if name != "float.tif"])  # which is refused
def test_images_of_every_format_equal_the_exact_ones_up_to_rounding(name: str) -> None:
    data = whole_images()[name]
    small = Preprocessing(image_size=32)
    result = []
    for augmentation in (Augmentation(exact=True), Augmentation()):
        torch.manual_seed(1)
        transform = TrainingTransform(augmentation, small)
        with decoding_at_least(transform.decode_size):
            result.append(transform(open_image(io.BytesIO(data), "")))
    assert result[0].shape == result[1].shape == (3, 32, 32)
    assert (result[0].float() - result[1].float()).abs().mean() < 2


def test_exact_decodes_the_whole_image_and_resizes_with_pillow(temple: Image.Image) -> None:
    """The definition written out, on the pixels that Pillow decodes."""
    data = jpeg(temple.resize((1280, 960)))
    transform = TrainingTransform(Augmentation(exact=True), Preprocessing())
    with decoding_at_least(transform.decode_size):
        decoded = open_image(io.BytesIO(data), "")
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data))))
    torch.manual_seed(5)
    share, y, x = torch.rand(3).tolist()
    side = round(240 * (0.9 + 0.1 * share) ** 0.5)  # in units of four pixels, as at a quarter of the size
    left, top = round(x * (320 - side)), round(y * (240 - side))
    box = (4 * left, 4 * top, 4 * (left + side), 4 * (top + side))
    expected = np.asarray(decoded.resize((224, 224), Image.Resampling.BICUBIC, box, 2.0))
    torch.manual_seed(5)
    found = transform(decoded)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_colour_augmentation_works_with_and_without_exact(temple: Image.Image, exact: bool) -> None:
    grey = TrainingTransform(Augmentation(color_jitter=0.4, grayscale=1.0, exact=exact), Preprocessing())(temple)
    assert grey.dtype == torch.uint8
    assert torch.equal(grey[0], grey[2])
    assert grey.float().std() > 20
