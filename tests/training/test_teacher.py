"""Distillation: the teacher has its own preprocessing, sees all ranks' pairs, and is not part of the student."""

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

import lit_clip.losses.weighted
from callbacks import EMA
from lit_clip import load_model
from lit_clip.batch import CaptionBatch
from lit_clip.commands.wise_ft import save
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sum
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Pairs
from lit_clip.losses.weighted import ModelFeatures, blockwise_distillation, distillation_loss, feature_distance
from lit_clip.models import preprocess as pp
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.module import LitCLIP
from lit_clip.training.schedules import WarmupCosine
from lit_clip.training.teacher import Distillation, Teacher
from tests.helpers.ranks import PAIRS, finetuned_module, make_batch
from tests.losses.test_tiled import Largest
from tests.test_module import data_for, trainer


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[CLIP, Path]:
    """A model with another image size, context length and feature size than the students, and its checkpoint."""
    config = CLIPConfig(
        embed_dim=24,
        image=VisionTransformerConfig(image_size=48, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=20, width=16, layers=1, heads=1),
        preprocessing=Preprocessing(image_size=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)),
    )
    model = CLIP(config).eval()
    save(model, tmp_path / "teacher.ckpt", {})
    return model, tmp_path / "teacher.ckpt"


def test_the_loss_is_open_clips_with_the_teachers_own_preprocessing(teacher: tuple[CLIP, Path]) -> None:
    model, path = teacher
    module, batch = finetuned_module(distilling(path, 0.7)), make_batch(slice(0, PAIRS))
    with torch.no_grad():
        resized = TF.resize(batch.images, [48, 48], TF.InterpolationMode.BICUBIC, antialias=True)
        assert model.preprocessing.mean == (0.5, 0.5, 0.5)
        image = unit(model.encode_image(pp.normalize(resized, model.preprocessing)))
        text = unit(model.encode_text(model.tokenize(list(batch.captions))))
        student = module(batch)
        losses: Any = open_clip.loss.DistillClipLoss()(
            *student, module.model.logit_scale.exp(), image.double(), text.double(), model.logit_scale.exp().double()
        )
        loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(losses[0].item() + 0.7 * losses[1].item(), rel=1e-5)
    assert losses[1].item() > 0.1


def distilling(path: Path, weight: float = 1.0) -> str:
    """Return LitCLIP's arguments for the default loss and distillation, as JSON."""
    return json.dumps({"teacher": str(path), "weight": weight})


def teacher_of(module: LitCLIP) -> Teacher:
    assert isinstance(module.loss, Sum)
    (teacher,) = (term.loaded for term in module.loss.terms if isinstance(term, Distillation))
    assert teacher is not None
    return teacher


@pytest.mark.parametrize("logits", [1, 50, 10_000])
@pytest.mark.parametrize("pairs", [1, 7])
def test_blockwise_loss_and_gradients_equal_those_of_all_logits_at_once(
    pairs: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_clip.losses.weighted, "LOGITS", logits)
    results = []
    for blockwise in (True, False):
        generator = torch.Generator().manual_seed(3)
        features = [unit(torch.randn(4, pairs, 5, generator=generator, dtype=torch.float64)[i]) for i in range(4)]
        scales = [torch.tensor(x, dtype=torch.float64) for x in (14.0, 50.0)]
        leaves = [x.requires_grad_() for x in (*features[:2], scales[0])]
        ours, theirs = ModelFeatures(*features[:2], scales[0]), ModelFeatures(*features[2:], scales[1])
        if blockwise:
            loss = blockwise_distillation(ours, theirs, RankCounts(0, (pairs,)))
        else:
            rows = slice(pairs)
            loss = distillation_loss(ours.logits(rows, *features[:2]), theirs.logits(rows, *features[2:]))
        results.append([loss, *torch.autograd.grad(2 * loss, leaves)])
    for our, expected in zip(*results, strict=True):
        torch.testing.assert_close(our, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("counts", [(7,), (3, 0, 4)])
def test_the_distance_of_features_equals_a_loop_over_all_pairs_of_any_ranks(counts: tuple[int, ...]) -> None:
    """Of features of any length; a teacher with more channels is cut, as Matryoshka's students are."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(7, dim, generator=generator, dtype=torch.float64).requires_grad_() for dim in (5, 5, 8, 8)]
    ours = torch.zeros((), dtype=torch.float64)
    for rank in range(len(counts)):
        image, text, *teacher = (each[RankCounts(rank, counts).mine] for each in whole)
        ours = ours + feature_distance((image, text), tuple(teacher), RankCounts(rank, counts)) / len(counts)
    theirs = torch.zeros((), dtype=torch.float64)
    for row in range(7):
        for student, target in zip(whole[:2], whole[2:], strict=True):
            a, b = student[row], target[row, :5]
            theirs = theirs + (2 - 2 * (a @ b) / (a.norm() * b.norm())) / 7  # of unit vectors
    for our, expected in zip(torch.autograd.grad(ours, whole), torch.autograd.grad(theirs, whole), strict=True):
        torch.testing.assert_close(our, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_without_a_name_the_teacher_is_the_model_before_also_on_resume(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """As with its file's name, and a run that begins with another model does not go on."""
    for name in ("before", "other"):
        save(CLIP(tiny_config), tmp_path / f"{name}.ckpt", {})

    def run(teacher: str | None, start: str = "before", resumed: Path | None = None) -> LitCLIP:
        loss = Sum([Contrastive(), Distillation(teacher, "features")], [1, 3])
        module = LitCLIP(pretrained=tmp_path / f"{start}.ckpt", loss=loss, freeze=Freeze(text="all"))
        fitting = trainer(tmp_path, max_steps=4 if resumed else 2)
        fitting.fit(module, data_for(module, caption_table), ckpt_path=resumed, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{'resumed' if resumed else 'last'}.ckpt")
        return module

    named, unnamed = run(str(tmp_path / "before.ckpt")), run(None)
    for name, value in named.model.state_dict().items():
        assert torch.equal(value, unnamed.model.state_dict()[name]), name
    last = tmp_path / "last.ckpt"
    teacher = teacher_of(run(None, resumed=last)).model
    before = load_model(tmp_path / "before.ckpt").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(InputError, match="the model before training, which is another one than the checkpoint's run"):
        run(None, "other", last)


def test_at_most_one_block_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_clip.losses.weighted, "LOGITS", 1000)
    generator = torch.Generator().manual_seed(3)
    image, text = (unit(torch.randn(200, 4, generator=generator)).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0)
    with Largest() as largest:
        theirs = ModelFeatures(image.detach(), text.detach(), scale)
        blockwise_distillation(ModelFeatures(image, text, scale), theirs, RankCounts(0, (200,))).backward()
    assert 400 < largest.elements <= 1000


def test_the_teacher_is_in_no_checkpoint_optimizer_copy_or_parameter_list(
    teacher: tuple[CLIP, Path], tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    loss = Sum([Contrastive(), Distillation(str(teacher[1]))])
    module = LitCLIP(tiny_config, loss=loss, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    plain = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    fitting = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=[EMA(0.5)])
    fitting.fit(module, data_for(module, caption_table))
    assert float(fitting.callback_metrics["train/distillation_loss"]) > 0
    fitting.save_checkpoint(tmp_path / "student.ckpt")
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    checkpoint = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == plain.model.state_dict().keys()
    distillation = {
        "class_path": "lit_clip.training.teacher.Distillation",
        "init_args": {"teacher": str(teacher[1]), "of": "probabilities"},
    }
    assert checkpoint["parts"]["loss"]["init_args"]["terms"][1] == distillation
    loaded = teacher_of(module)
    assert teacher_of(copy.deepcopy(module)) is loaded
    assert not loaded.model.training
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, teacher[0].state_dict()[name]), name
    teacher[1].unlink()
    LitCLIP.load_from_checkpoint(tmp_path / "student.ckpt")  # using a student needs no teacher


def test_a_missing_teacher_missing_captions_and_a_negative_weight_are_refused(teacher: tuple[CLIP, Path]) -> None:
    with pytest.raises(InputError, match=r"nowhere.ckpt"):
        LitCLIP("ViT-tiny-16-64", loss=Distillation("nowhere.ckpt")).setup("fit")
    module = finetuned_module(distilling(teacher[1]))
    with pytest.raises(InputError, match="the teacher needs captions, and the data module's batches have none"):
        module.training_step(CaptionBatch(*make_batch(slice(0, 4))[:3]), 0)
    with pytest.raises(InputError, match=r"Sum.weights \[1, -1\] must be at least 0"):
        Sum([Contrastive(), Distillation("teacher.ckpt")], [1, -1])
    with pytest.raises(InputError, match="Distillation.of 'logits' must be 'probabilities' or 'features'"):
        Distillation("teacher.ckpt", "logits")  # pyright: ignore[reportArgumentType]


# Distillation from tables of features, of any program and any width, equals a plain loop; no table is trusted.


KEYS = ["b.png", "a.png", "b.png", "c.png"]
CAPTIONS = ["two dogs", "a kite", "a dog", "two dogs"]


def write(path: Path, column: str, names: list[str], features: Any, **metadata: str) -> str:
    """Write a table as other programs do: lists of any length, rows in any order."""
    table = pa.table({column: names, "feature": features})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


@pytest.fixture
def tables(tmp_path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return files of images and captions in 5 channels of double precision, and the vectors by name."""
    generator, found, paths = np.random.default_rng(0), {}, []
    for column, names in (("key", ["c.png", "other.png", "a.png", "b.png"]), ("caption", sorted({*CAPTIONS, "more"}))):
        vectors = generator.normal(size=(len(names), 5)) * 3
        paths.append(write(tmp_path / f"{column}s.parquet", column, names, vectors.tolist(), logit_scale="20.0"))
        found |= dict(zip(names, torch.from_numpy(vectors), strict=True))
    return paths, found


def pairs_of(dim: int) -> tuple[Pairs, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    leaves = [unit(torch.randn(4, dim, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    batch = CaptionBatch(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.long), KEYS, CAPTIONS)
    scale = torch.tensor(14.0, dtype=torch.float64)
    return Pairs(*leaves, scale, None, RankCounts(0, (4,)), batch, [batch], 0), leaves


def check(distillation: Distillation, student: CLIP, dim: int, loop: Any) -> None:
    distillation.prepare(student)
    pairs, leaves = pairs_of(dim)
    found, expected = distillation(pairs), loop(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_probabilities_and_their_gradients_equal_a_loop_in_double_precision(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig
) -> None:
    """The tables' vectors have any length and another width than the model's, and name their temperature."""
    paths, vectors = tables

    def loop(image: Tensor, text: Tensor) -> Tensor:
        theirs = [vectors[name] / vectors[name].norm() for name in (*KEYS, *CAPTIONS)]
        total = torch.zeros((), dtype=torch.float64)
        for student, teacher, others, known in (
            (image, theirs[:4], text, theirs[4:]),
            (text, theirs[4:], image, theirs[:4]),
        ):
            for row in range(4):
                wanted = torch.stack([20 * teacher[row] @ other for other in known]).softmax(0)
                logits = torch.stack([14 * student[row] @ other for other in others])
                total = total - (wanted * logits.log_softmax(0)).sum() / 8
        return total

    check(Distillation(paths), CLIP(tiny_config), 16, loop)


@pytest.mark.parametrize("which", [("key",), ("caption",), ("caption", "key")])
def test_the_distance_of_one_or_both_encoders_equals_a_loop(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig, tmp_path: Path, which: tuple[str, ...]
) -> None:
    """The model's 16 channels are mapped to the tables' 5, by their first rows before training."""
    paths, vectors = [str(tmp_path / f"{column}s.parquet") for column in which], tables[1]

    def loop(image: Tensor, text: Tensor) -> Tensor:
        total = 0 * (image.sum() + text.sum())
        for column, student, names in (("key", image, KEYS), ("caption", text, CAPTIONS)):
            for row, name in enumerate(names) if column in which else ():
                ours, theirs = student[row, :5], vectors[name]
                total = total + (2 - 2 * (ours @ theirs) / (ours.norm() * theirs.norm())) / 4
        return total

    teacher: Any = paths if len(paths) > 1 else paths[0]
    distillation = Distillation(teacher, "features")
    distillation.prepare(CLIP(tiny_config))
    distillation.double()
    pairs, leaves = pairs_of(16)
    found, expected = distillation(pairs), loop(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(found, leaves, allow_unused=True)
    for our, theirs in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if our is None else our, theirs, rtol=1e-5, atol=1e-8)


def test_probabilities_need_a_table_of_images_and_one_of_captions(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    (images, captions), student = tables[0], CLIP(tiny_config)
    wider = write(tmp_path / "wider.parquet", "caption", ["a"], [[1.0] * 6])
    for teacher, message in (
        (images, "5 channels of images and 0 of captions"),
        ([images, wider], "5 channels of images and 6 of captions"),
        ([images, images], "one table of images and one of captions"),
    ):
        with pytest.raises(InputError, match=message):
            Distillation(teacher).prepare(student)
    distillation = Distillation([captions, images])
    distillation.prepare(student)
    assert copy.deepcopy(distillation).loaded is distillation.loaded  # large
    pairs, _ = pairs_of(16)
    with pytest.raises(InputError, match="batches with captions"):
        distillation(dataclasses.replace(pairs, batch=pairs.batch._replace(captions=())))
    things = pairs.batch._replace(image_of=torch.tensor([[0, 1], [2, -1], [3, -1], [3, -1]]))
    with pytest.raises(InputError, match=r"^model\.loss: a table of images .* data\.images\.per_thing"):
        distillation(dataclasses.replace(pairs, batch=things))


def test_a_damaged_or_foreign_table_is_one_line_that_names_it(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    tables = {
        "different numbers": pa.table({"key": ["a", "b"], "feature": [[1.0, 2.0], [1.0]]}),
        "null": pa.table({"key": ["a", "b"], "feature": [[1.0], None]}),
        "row \\[1\\]": pa.table({"key": ["a", "b"], "feature": [[1.0], [float("nan")]]}),
        "row \\[0\\]": pa.table({"key": ["a", "b"], "feature": [[0.0], [1.0]]}),
        "feature": pa.table({"key": ["a"], "vector": [[1.0]]}),
        "value_lengths": pa.table({"key": ["a"], "feature": ["text"]}),
        "claims 1000000 rows": pa.table(
            {"key": pa.array(["a"] * 1_000_000).dictionary_encode(), "feature": [[1.0]] * 1_000_000}
        ),
    }
    for message, table in tables.items():
        pq.write_table(table, path)
        with pytest.raises(InputError, match=f"features.parquet.*({'different' if message == 'null' else message})"):
            Distillation(str(path), "features").prepare(CLIP(tiny_config))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="features.parquet: not a readable table"):
        Distillation(str(path), "features").prepare(CLIP(tiny_config))
