"""Distillation from a teacher: any model that loads, or tables of its features by image key and by text."""

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample, InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.weighted import ModelFeatures, blockwise_distillation, feature_distance
from lit_clip.models.clip import CLIP
from lit_clip.models.config import height_width
from lit_clip.models.fingerprint import tensors_sha256
from lit_clip.models.layers import TOWERS, Tower
from lit_clip.models.lora import is_added
from lit_clip.tools.hardware import to_device
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import shortened
from lit_clip.weights.load import load_model

SCALE = 100.0  # inverse temperature of most published models, for tables that do not name theirs


class TeacherTable(NamedTuple):
    """A parquet file with the columns ``feature`` and ``key``, or ``caption`` for features of captions."""

    path: str
    tower: Tower
    rows: dict[str, int]  # by key or caption
    features: Tensor  # float32 [N, D], of any length
    scale: float

    @classmethod
    def read(cls, path: str) -> "TeacherTable":
        """Read and check a file."""
        import pyarrow.parquet as pq

        with reading(path, "table of features", "model.loss", "write it with lit-clip embed"):
            file: Any = pq.ParquetFile(path)
            if file.metadata.num_rows > Path(path).stat().st_size:  # a row takes more than a byte
                raise ValueError(f"it claims {file.metadata.num_rows} rows")
            column = "caption" if "caption" in file.schema_arrow.names else "key"
            table = file.read(columns=[column, "feature"])
            table.validate(full=True)
            lists = table["feature"].combine_chunks()
            if lists.null_count or len(np.unique(lists.value_lengths())) != 1:
                raise ValueError("its rows have different numbers of features")
            numbers = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            features = torch.from_numpy(numbers.reshape(len(lists), -1))
            rows = {name: row for row, name in enumerate(table[column].to_pylist())}
            scale = float((file.schema_arrow.metadata or {}).get(b"logit_scale", SCALE))
        lengths = features.norm(dim=1)
        wrong = (~((lengths > 0) & lengths.isfinite())).nonzero()[:, 0].tolist()
        require(not wrong, f"model.loss: {path}: features of row {wrong[:1]} are 0 or not finite; leave the row out")
        return cls(path, "text" if column == "caption" else "image", rows, features, scale)

    def of(self, names: list[str]) -> Tensor:
        """Return the features ``[n, D]`` of keys or captions; raise :class:`InputError` for unknown ones."""
        if absent := [name for name in names if name not in self.rows]:
            kind = "captions" if self.tower == "text" else "keys"
            lacks = f"lacks {len(absent)} of {len(names)} {kind}, such as {shortened(absent[0])}"
            raise InputError(f"model.loss: {self.path}: {lacks}; encode all training pairs")
        return self.features[[self.rows[name] for name in names]]


class TeacherTables:
    """Features of any teacher: from a table of images, a table of captions, or one of each."""

    def __init__(self, paths: list[str]) -> None:
        self.tables: dict[Tower, TeacherTable] = {table.tower: table for table in map(TeacherTable.read, paths)}
        one = len(self.tables) == len(paths)
        require(one, f"model.loss: {' and '.join(paths)}: give one table of images and one of captions")
        self.scale = torch.tensor(max(table.scale for table in self.tables.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherTables":
        return self

    def dim(self, tower: Tower) -> int:
        """Return the number of channels; 0 without a table."""
        return self.tables[tower].features.shape[1] if tower in self.tables else 0

    def of_pairs(self, pairs: Pairs, tower: Tower) -> Tensor:
        """Return the features ``[B, D]`` of this rank's pairs."""
        image_of = pairs.batch.image_of
        several = "model.loss: a table of images has one of each pair; set data.images.per_thing to one or all"
        require(tower == "text" or image_of is None or image_of.ndim == 1, several)
        names = pairs.batch.keys if tower == "image" else pairs.batch.captions
        require(len(names) == len(pairs.image), "model.loss: a table of captions needs batches with captions")
        return self.tables[tower].of([*names]).to(pairs.image.device)

    def check(self, data: Any) -> None:
        """Raise :class:`InputError` unless the tables have each training image and caption of ``data``."""
        source: Any = getattr(data, "train_source", None) or ()

        def listed(tower: Tower) -> Iterator[str]:
            for row in range(len(source)):
                with suppress(BadSample):  # loading it will raise or skip it
                    yield from [source.key(row)] if tower == "image" else source.captions(row)

        for tower, table in self.tables.items():
            if tower == "image" or getattr(data, "lists_captions", False):
                table.of([*dict.fromkeys(listed(tower))])


class Teacher:
    """A frozen model with its own tokenizer, image size and normalisation; it sees the student's augmented images.

    Not a module, so that it is never part of a student's parameters, checkpoints or copies.
    """

    def __init__(self, model: CLIP) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def features(self, batch: CaptionBatch, tower: Tower) -> Tensor:
        """Return unit features ``[B, D]`` of images or captions."""
        model = self.model.to(batch.images.device)
        if tower == "image":
            return model.encode_image(model.normalize(self.resized(batch.images)), normalize=True)
        captioned = len(batch.captions) == len(batch.tokens)
        require(captioned, "model.loss: the teacher needs captions, and the data module's batches have none")
        tokens = model.tokenize(batch.captions)
        lengths = model.tokenizer.lengths(tokens).tolist()
        tokens = to_device(model.tokenizer.trim(tokens), batch.images.device)
        return model.encode_text(tokens, normalize=True, lengths=lengths)

    def dim(self, tower: Tower) -> int:
        """Return the number of channels."""
        return self.model.config.embed_dim

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, a scalar."""
        return self.model.logit_scale.exp()

    def of_pairs(self, pairs: Pairs, tower: Tower) -> Tensor:
        """Return unit features ``[B, D]`` of this rank's pairs."""
        features = torch.cat([self.features(part, tower) for part in pairs.parts])
        return pairs.batch.of_pairs(features) if tower == "image" else features[: len(pairs.image)]

    def resized(self, images: Tensor) -> Tensor:
        """Return uint8 images of the teacher's size."""
        preprocessing = self.model.preprocessing
        size_HW, ours = list(height_width(preprocessing.image_size)), preprocessing.patch_size
        if images.ndim == 3 or ours is not None:
            same = images.ndim == 3 and ours is not None and images.shape[2] == 3 * ours**2
            require(same, "model.loss: a teacher and its student must both read NaFlex's patches, or neither")
        elif images.shape[1] != preprocessing.bands:
            raise InputError(f"model.loss: the teacher reads {preprocessing.bands} bands, not {images.shape[1]}")
        elif list(images.shape[-2:]) != size_HW:
            images = TF.resize(images, size_HW, TF.InterpolationMode.BICUBIC, antialias=True)
        return images


def stored_name(teacher: object, tower: Tower) -> str:
    """Return the key in ``CaptionBatch.extra`` of a teacher's stored features."""
    return f"{tower} features of {teacher}"


Kind = Literal["probabilities", "features"]


class Distillation(Loss):
    """Distance to a teacher; the model learns from it, or stays close to it if it is the model before training.

    Use it beside another loss, with :class:`lit_clip.losses.Sum`; a sum may have several. The teacher keeps its own
    preprocessing and tokenizer; it is loaded when training starts, and in no checkpoint. It encodes the batch of each
    step, or with :class:`callbacks.FrozenFeatures` each image and caption once.

    Args:
        teacher: anything :func:`lit_clip.load_model` opens; or a parquet file of its features by key, as ``lit-clip
            embed`` writes it, or two: of images and of captions; None: the model before training. A checkpoint has its
            SHA-256, so a run is only resumed with the same one.
        of: ``probabilities``: cross-entropy between the teacher's and the model's over the batch's images and captions;
            ``features``: squared distance of unit features. If the teacher has another number of channels, a linear
            map of the model's features is learned for each encoder (CLIP-KD, Yang et al. 2024).
    """

    def __init__(self, teacher: str | list[str] | None = None, of: Kind = "probabilities") -> None:
        super().__init__()
        require(of in get_args(Kind), f"model.loss: Distillation.of {of!r} must be 'probabilities' or 'features'")
        self.teacher, self.of = teacher if isinstance(teacher, list) else teacher and str(teacher), of
        self.loaded: Teacher | TeacherTables | None = None
        self._before = torch.zeros(0, dtype=torch.uint8)  # SHA-256 of the model before
        self.maps: Any = nn.ModuleDict()

    def prepare(self, model: Any) -> None:
        if self.loaded is None and self.teacher is None:
            self.loaded = Teacher(copy.deepcopy(model))
            given = {
                name: value for name, value in model.state_dict().items() if not is_added(name)
            }  # LoRA's is random
            self._before = torch.tensor(list(bytes.fromhex(tensors_sha256(given))), dtype=torch.uint8)
        elif self.loaded is None:
            paths = self.teacher if isinstance(self.teacher, list) else [str(self.teacher)]
            if all(Path(path).suffix == ".parquet" for path in paths):
                self.loaded = TeacherTables(paths)
            else:
                self.loaded = Teacher(load_model(str(self.teacher)))
        ours, (image, text) = model.config.embed_dim, (self.loaded.dim(tower) for tower in TOWERS)
        if self.of == "probabilities" and (image != text or not image):
            found = f"its teacher has {image} channels of images and {text} of captions"
            raise InputError(f"model.loss: Distillation: {found}; give a table of each, or set of to features")
        widths = {tower: dim for tower, dim in zip(TOWERS, (image, text), strict=True) if dim not in (0, ours)}
        if self.of == "features" and widths and not self.maps:
            self.maps.update({tower: nn.Linear(ours, theirs) for tower, theirs in widths.items()})
            for each in self.maps.values():  # lengths are kept; random ones would depend on the number of ranks
                nn.init.eye_(each.weight)
                nn.init.zeros_(each.bias)

    def forward(self, pairs: Pairs) -> Tensor:
        assert self.loaded is not None, "call prepare first"
        towers: list[Tower] = [tower for tower in TOWERS if self.loaded.dim(tower)]
        theirs = [self._teachers(pairs, tower) for tower in towers]
        if self.of == "features":
            ours = [self._mapped(tower, getattr(pairs, tower)) for tower in towers]
            return feature_distance(ours, theirs, pairs.ranks)
        student = ModelFeatures(pairs.image, pairs.text, pairs.scale)
        return blockwise_distillation(student, ModelFeatures(theirs[0], theirs[1], self.loaded.scale), pairs.ranks)

    def _teachers(self, pairs: Pairs, tower: Tower) -> Tensor:
        """Return the teacher's unit features ``[B, D]``; stored ones if the batch has them."""
        assert self.loaded is not None
        features = pairs.batch.extra.get(stored_name(self.teacher, tower))
        if not len(pairs.image):
            features = pairs.image.new_zeros(0, self.loaded.dim(tower))
        elif features is None:
            features = self.loaded.of_pairs(pairs, tower)
        return unit(features).to(pairs.image.dtype)

    def _mapped(self, tower: Tower, features: Tensor) -> Tensor:
        """Map the model's features to the teacher's number of channels; Matryoshka's may be the first ones."""
        if tower not in self.maps:
            return features
        return F.linear(features, self.maps[tower].weight[:, : features.shape[1]], self.maps[tower].bias)

    def chance_loss(self, pairs: int) -> float | None:
        """Return log N, the cross-entropy if all candidates are equally likely; None for a distance."""
        return math.log(pairs) if self.of == "probabilities" else None

    def get_extra_state(self) -> Tensor:
        return self._before

    def set_extra_state(self, state: Tensor) -> None:
        same = self.loaded is None or torch.equal(state.cpu(), self._before)
        require(
            same,
            "model.loss: Distillation keeps close to the model before training, which is another one than the "
            "checkpoint's run began with; set model.pretrained as it was then",
        )
