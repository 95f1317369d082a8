"""Encode every image and caption once through the frozen layers, and train the rest on the stored activations."""

from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.frozen_prefix import FrozenPrefix, find_frozen_prefix, use_frozen_prefix
from lit_clip.models.layers import TOWERS
from lit_clip.models.running import evaluation_mode
from lit_clip.module import LitCLIP
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.stored_rows import ABSENT
from lit_clip.training.frozen_features import (
    Encoding,
    StoredImages,
    StoredTeacher,
    StoredTexts,
    Texts,
    my_share,
    open_rows,
    store_images,
    store_texts,
)
from lit_clip.training.lightning.fsdp import whole_weights
from lit_clip.training.losses import OtherImageContrastive, PlaceContrastive
from lit_clip.training.micro_batches import HARD_NEGATIVES
from lit_clip.training.teacher import Distillation, Teacher
from .compile import Compile


class FrozenFeatures(Callback):
    """Encode each image and caption of ``fit`` once through the frozen layers, before the first step.

    Steps and validations then read the activations from memory-mapped files, decode no image, and compute only the
    layers behind: losses equal those of the plain run to rounding. A tower of which nothing is frozen trains as usual,
    and so does the text encoder where captions are made up at random, as OpenMoji's are. The teachers of
    :class:`lit_clip.training.teacher.Distillation` encode each training image and caption once, too.
    An interrupted run goes on encoding where it was, and a later run encodes only the rows whose files were damaged,
    unless the frozen weights, the preprocessing, the precision, the images or the captions have changed.

    Args:
        folder: for the files, shared by all ranks; None: ``~/.cache/lit-clip/frozen_features``. Files of earlier
            settings are left there.
        augmentations: fixed augmented versions of each training image, of which each epoch draws one. 0: none, which
            needs ``data.augmentation: []``.
    """

    changes_model = True  # before others measure it

    def __init__(self, folder: str | None = None, augmentations: int = 0) -> None:
        require(augmentations >= 0, f"FrozenFeatures.augmentations: {augmentations} must be at least 0")
        self.folder, self.augmentations = folder, augmentations
        self._in_use = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if cast(Any, trainer).fast_dev_run:  # would encode everything for a few steps
            return
        module, data = cast(LitCLIP, pl_module), cast(Any, trainer).datamodule
        with whole_weights(module):
            self._encode(trainer, module, data)

    def _encode(self, trainer: Trainer, module: LitCLIP, data: Any) -> None:
        for tower in TOWERS if data.lists_captions else TOWERS[:1]:
            use_frozen_prefix(module.model, tower)
        terms = [each for each in module.loss.modules() if isinstance(each, Distillation)]
        teachers: Any = {each.teacher: each.loaded for each in terms if isinstance(each.loaded, Teacher)}
        if not module.model.frozen_prefixes and not teachers:
            raise InputError(f"FrozenFeatures: {_nothing_stored(module.model, data)}, or remove the callback")
        _refuse_loss(module, data)
        with evaluation_mode(module):
            self._store(trainer, module, teachers)

    def _store(self, trainer: Trainer, module: LitCLIP, teachers: dict[str | None, Any]) -> None:
        """Encode the missing images and captions, and pass the files to the data module."""
        data, prefixes = cast(Any, trainer).datamodule, module.model.frozen_prefixes
        context = trainer.precision_plugin.forward_context
        encoding = Encoding(module.model, context, str(trainer.precision), data.evaluation_batch_size)
        folder = Path(self.folder) if self.folder else data.cache_folder / "frozen_features"
        images = texts = None
        if "image" in prefixes or teachers:
            rows, stored = data.image_rows(self.augmentations), None
            if "image" in prefixes:
                stored = open_rows(encoding, prefixes["image"], folder, rows.count, rows.identity)
                wanted = my_share(stored)
                store_images(encoding, prefixes["image"], stored, data.images_once(rows, wanted), len(wanted))
            stored_teachers = [_store_teacher(*each, encoding, folder, data, rows) for each in teachers.items()]
            images = StoredImages(rows, stored, stored_teachers)
        if "text" in prefixes:
            texts = _store_texts(encoding, prefixes["text"], folder, data.distinct_texts())
        distributed.barrier()
        every = [images and images.stored, texts and texts.stored]
        for teacher in images.teachers if images else ():
            every += [teacher.images, teacher.texts and teacher.texts.stored]
        for kept in every:
            require(kept is None or not np.any(kept.state() == ABSENT), f"{folder}: all machines must share it")
        data.stored_images, data.stored_texts = images, texts
        self._in_use = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(LitCLIP, pl_module).model.frozen_prefixes = {}
        if self._in_use:
            data = cast(Any, trainer).datamodule
            data.stored_images = data.stored_texts = None
            self._in_use = False


def _store_texts(encoding: Encoding, prefix: FrozenPrefix, folder: Path, texts: Texts) -> StoredTexts:
    """Encode the missing captions."""
    identity, longest = hex_digest([texts.hashes.tobytes()]), texts.tokens.shape[1]
    stored = open_rows(encoding, prefix, folder, len(texts.hashes), identity, longest)
    store_texts(encoding, prefix, stored, texts, my_share(stored))
    return StoredTexts(texts.hashes, stored, longest)


def _store_teacher(
    name: str | None, teacher: Teacher, student: Encoding, folder: Path, data: Any, rows: Any
) -> StoredTeacher:
    """Encode the training images and captions that a teacher's files lack."""
    encoding = student._replace(model=teacher.model.to(student.model.device))
    identity = hex_digest([rows.trained_identity, data.preprocessing])  # images are the student's
    images = open_rows(encoding, FrozenPrefix("image"), folder, rows.trained, identity)
    wanted = my_share(images)
    batches = (
        batch._replace(images=teacher.resized(batch.images.to(encoding.model.device))) if len(batch.rows) else batch
        for batch in data.images_once(rows, wanted)
    )
    store_images(encoding, FrozenPrefix("image"), images, batches, len(wanted))
    texts = None
    if data.lists_captions:
        found = data.distinct_texts(teacher.model.tokenizer)
        texts = _store_texts(encoding, FrozenPrefix("text"), folder, found)
        teacher.model.cpu()  # no longer needed
    return StoredTeacher(name, images, texts)


def _nothing_stored(model: CLIP, data: Any) -> str:
    """Explain why neither encoder's activations can be stored, and what to change."""
    if find_frozen_prefix(model, "text") is None:
        return "no encoder has frozen layers to store; set model.freeze"
    if data.captions.long == "sentences":
        return (
            "only the text encoder is frozen, and data.captions.long: sentences draws other texts in each epoch, "
            "which cannot be stored; set data.captions.long to truncate"
        )
    return "only the text encoder is frozen, and the data draw captions that they do not list; freeze images too"


def _refuse(trainer: Trainer, module: LightningModule) -> None:
    """Raise :class:`InputError` for settings that cannot train on stored activations."""
    data = cast(Any, trainer).datamodule
    require(hasattr(data, "stored_images"), "FrozenFeatures: needs a data module derived from CaptionDataModule")
    several = getattr(getattr(data, "images", None), "per_thing", None) == "together"
    require(not several, "data.images.per_thing: together averages images anew; FrozenFeatures reads one or all")
    compiled = any(isinstance(callback, Compile) for callback in cast(Any, trainer).callbacks)
    require(not compiled, "FrozenFeatures: not together with callbacks.Compile; remove one of them")


def _refuse_loss(module: LitCLIP, data: Any) -> None:
    """Raise :class:`InputError` for a loss that needs inputs which are not encoded."""
    for part in module.loss.modules():
        needs_images = isinstance(part, OtherImageContrastive | PlaceContrastive)
        needs_images = needs_images and "image" in module.model.frozen_prefixes
        require(not needs_images, f"FrozenFeatures: {type(part).__name__} needs images; remove one of them")
    negatives = module.loss.uses_negatives and getattr(data, "negative_column", None)
    require(not negatives or "text" not in module.model.frozen_prefixes, HARD_NEGATIVES)
