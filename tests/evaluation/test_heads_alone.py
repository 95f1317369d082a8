"""Heads alone: features before them, and what training them reaches."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import callbacks
from callbacks import FrozenFeatures, HeadsFirst, Proof
from datamodules import Captions
from datamodules.pairs.source import CaptionOptions
from lit_clip.evaluation.before_after import PairFeatures, measure
from lit_clip.evaluation.heads_alone import features_before_heads, heads_of, train_heads
from lit_clip.losses import Contrastive
from lit_clip.losses.contrastive import unit
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.retrieval.metrics import PairIndices
from lit_clip.training.optimizers import PaperAdamW
from tests.helpers.coloured_sets import paint
from tests.helpers.towers import WORDS, save_family, shaken
from tests.test_module import trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CLIPConfig:
    folder = save_family("bert", tmp_path_factory.mktemp("bert") / "bert")
    return CLIPConfig(
        16, TimmConfig("test_efficientnet", image_size=32), HuggingFaceTextConfig(str(folder), context_length=16)
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images with two captions each, some of them of several images."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = ["image,caption"]
    for number in range(60):
        paint(folder / f"{number // 2}.png", 9 * (number // 2))
        rows.append(f"{number // 2}.png,{WORDS[number % 20]} {WORDS[number // 20]} {WORDS[number % 7]}")
    rows[5] = f"2.png,{rows[9].partition(',')[2]}"
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "captions.csv"


def made(config: CLIPConfig, freeze: Freeze | None = None) -> LitCLIP:
    torch.manual_seed(0)
    module = LitCLIP(config, freeze=freeze)
    shaken(module.model)
    return module


@pytest.mark.parametrize("per_image", ["all", "together"])
@pytest.mark.parametrize("stored", [False, True])
def test_features_before_the_heads_have_each_image_once_and_give_the_models_features(
    stored: bool, per_image: Any, config: CLIPConfig, table: Path, tmp_path: Path
) -> None:
    module = made(config, Freeze(UnlockLast(1), UnlockLast(1)))
    module.loss = Contrastive("positives")
    options = CaptionOptions(per_image=per_image)
    data = Captions(str(table), str(table), batch_size=7, num_workers=0, augmentation=[], captions=options)
    found: list[PairFeatures] = []

    class Look(callbacks.Proof):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with evaluation_mode(module):
                batches = data.training_once(60, 1_000)
                found.append(features_before_heads(module.model, batches, heads_of(module.model) or {}))

    storing = [FrozenFeatures(str(tmp_path / "stored"))] if stored else []
    trainer(tmp_path, callbacks=callbacks.defaults(*storing, Look()), max_steps=1).fit(module, data)
    fresh = made(config).model.eval()
    (features,) = found
    image = unit(cast(Any, fresh.visual).head(features.image))
    text = unit(cast(Any, fresh.text_encoder).proj(features.text))
    with torch.no_grad():
        assert len(features.keys) == 30
        assert len(features.pairs.image) == 60
        for number, key in enumerate(features.keys):
            expected = fresh.encode(table.parent / key)
            assert torch.allclose(image[number], expected, atol=1e-4)
        assert torch.allclose(text, fresh.encode(features.captions), atol=1e-4)


def test_training_the_heads_finds_what_two_linear_maps_can_and_changes_nothing_else(config: CLIPConfig) -> None:
    module = made(config)
    heads = heads_of(module.model)
    assert heads is not None
    widths = [next(head.parameters()).shape[1] for head in heads.values()]
    meaning = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    image, text = (meaning @ torch.randn(6, width, generator=torch.Generator().manual_seed(1)) for width in widths)
    rows = torch.arange(300)

    def features(first: int, last: int) -> PairFeatures:
        part, number = slice(first, last), rows[: last - first]
        pairs = PairIndices(number, number, torch.ones_like(number), torch.zeros_like(number))
        names = [str(row) for row in range(first, last)]
        return PairFeatures(names, names, image[part], text[part], pairs)

    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    random = torch.get_rng_state()
    trained = train_heads(module.model, heads, features(0, 200))
    again = train_heads(module.model, heads, features(0, 200))
    assert all(torch.equal(value, again[name]) for name, value in trained.items())
    assert torch.equal(random, torch.get_rng_state())
    assert trained.keys() <= before.keys()
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    held_out = features(200, 300)
    weights = [trained[f"{name}.{key}"] for name, head in heads.items() for key in head.state_dict()]
    recall = {}
    for name, (first, second) in (("trained", weights), ("new", [before[name] for name in trained][:2])):
        found = held_out._replace(image=unit(held_out.image @ first.T), text=unit(held_out.text @ second.T))
        recall[name] = float(measure(found).scores["image to text R@1"].mean())
    assert recall["trained"] > 0.5 > 0.1 > recall["new"]


@pytest.mark.parametrize("stored", [False, True])
def test_two_encoders_with_new_heads_are_compared_with_the_heads_alone_and_train_as_without(
    stored: bool, config: CLIPConfig, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    states = []
    for given in ([], [Proof()]):
        module = made(config, Freeze(UnlockLast(1), UnlockLast(1)))
        data = Captions(str(table), str(table), batch_size=20, num_workers=0, augmentation=[])
        storing = [FrozenFeatures(str(tmp_path / "stored"))] if stored else []
        trainer(tmp_path, callbacks=callbacks.defaults(*storing, *given), max_epochs=2).fit(module, data)
        states.append(module.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert "before: the heads alone" in capfd.readouterr().out


def test_a_run_starts_with_the_heads_that_were_trained_alone_and_is_compared_with_them(
    config: CLIPConfig, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(folder: str, *given: Any, rate: float = 0.0, **options: Any) -> LitCLIP:
        module = made(config, Freeze(UnlockLast(1), UnlockLast(1), batch_norm=True))
        module.optimization = LitCLIP(config, optimizer=partial(PaperAdamW, lr=rate)).optimization
        data = Captions(str(table), str(table), batch_size=20, num_workers=0, augmentation=[])
        storing = FrozenFeatures(str(tmp_path / "stored"))
        settings = {"max_steps": 2, **options}
        trainer(tmp_path / folder, callbacks=callbacks.defaults(storing, *given), **settings).fit(module, data)
        return module

    start, first = run("plain").model.state_dict(), run("first", HeadsFirst(), Proof()).model.state_dict()
    changed = {name for name, value in start.items() if not torch.equal(value, first[name])}
    assert changed == {"visual.head.proj.weight", "text.proj.weight", "logit_scale"}
    out = capfd.readouterr().out
    assert "before: the heads alone" in out
    differences = re.findall(r"held-out .* R@1 .* ([+-][0-9.]+) \(", out)
    assert differences == ["+0.0", "+0.0"]  # a rate of 0 changes nothing more


def test_steps_behind_trained_heads_drop_features_in_training_alone_and_resume_exactly(
    config: CLIPConfig, table: Path, tmp_path: Path
) -> None:
    seen: dict[bool, list[float]] = {True: [], False: []}

    class Look(callbacks.Proof):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for head in (heads_of(pl_module.model) or {}).values():
                head.register_forward_hook(lambda head, inputs, _: self.look(head.training, inputs[0]))

        def look(self, training: bool, features: torch.Tensor) -> None:
            seen[training].append(float((features == 0).double().mean()))

    def run(folder: str, steps: int, ckpt: str | None = None, *given: Any) -> LitCLIP:
        module = made(config, Freeze(UnlockLast(1), UnlockLast(1)))
        module.loss = Contrastive("positives")
        data = Captions(str(table), str(table), batch_size=20, num_workers=0, augmentation=[])
        data.captions = CaptionOptions(per_image="together")
        every = ModelCheckpoint(filename="last", enable_version_counter=False)
        parts = callbacks.defaults(FrozenFeatures(str(tmp_path / "stored")), HeadsFirst(0.25), every, *given)
        trainer(tmp_path / folder, callbacks=parts, max_steps=steps).fit(module, data, ckpt_path=ckpt)
        return module

    whole = run("whole", 3, None, Look())
    assert seen[True]
    assert seen[False]
    assert all(0.15 < share < 0.4 for share in seen[True])
    assert all(share < 0.15 for share in seen[False])
    run("part", 2)
    file = next((tmp_path / "part").rglob("last.ckpt"))
    resumed = run("rest", 3, str(file)).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_a_model_without_two_projections_starts_as_it_is(
    tiny_config: CLIPConfig, table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = LitCLIP(tiny_config)
    data = Captions(str(table), str(table), batch_size=20, num_workers=0)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, callbacks=callbacks.defaults(HeadsFirst()), max_steps=1).fit(module, data)
    assert "HeadsFirst: the run starts as it is" in caplog.text
