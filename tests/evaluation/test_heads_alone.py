"""Heads alone, and heads from few examples: features before them, and what training them reaches."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import callbacks
from callbacks import FrozenFeatures, HeadsFirst, Proof
from datamodules import Captions
from datamodules.pairs.source import CaptionOptions
from lit_clip.errors import InputError
from lit_clip.evaluation.before_after import PairFeatures, measure
from lit_clip.evaluation.class_head import PENALTY, PENALTY_ALONE, fit_head
from lit_clip.evaluation.few_shot import train_few_shot
from lit_clip.evaluation.heads_alone import features_before_heads, heads_of, train_heads
from lit_clip.evaluation.logistic import LogisticProblem
from lit_clip.evaluation.probe import Split, places_in_classes
from lit_clip.evaluation.targets import Targets
from lit_clip.losses import Contrastive
from lit_clip.losses.contrastive import unit
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.running import evaluation_mode
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


@pytest.mark.parametrize(
    ("stored", "per_image"), [pytest.param(False, "all", marks=pytest.mark.slow), (True, "together")]
)
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


@pytest.mark.parametrize("stored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_encoders_with_new_heads_are_compared_with_the_heads_alone_and_train_as_without(
    stored: bool, config: CLIPConfig, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    states = []
    for given in ([], [Proof()]):
        module = made(config, Freeze(UnlockLast(1), UnlockLast(1)))
        data = Captions(str(table), str(table), batch_size=20, num_workers=0, augmentation=[])
        storing = [FrozenFeatures(str(tmp_path / "stored"))] if stored else []
        trainer(tmp_path, callbacks=callbacks.defaults(*storing, *given), max_epochs=1).fit(module, data)
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


@pytest.mark.slow
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


def examples(count: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return features ``[N, W]`` away from the origin, logits ``[N, C]`` that know something, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, width, generator=random)
    features = means[labels] + 1.5 * torch.randn(count, width, generator=random) + 3
    zero_shot = torch.randn(count, classes, generator=random) + 1.5 * torch.eye(classes)[labels]
    return features, zero_shot, labels


def objective(
    parameters: np.ndarray, features: Tensor, offset: Tensor, labels: Tensor, l2: float
) -> tuple[float, np.ndarray]:
    """Return the loss with its penalty, and the gradient, for one row of weight and bias per logit."""
    x, o = features.double().numpy(), offset.double().numpy()
    x = x - x.mean(axis=0)
    spread = (x**2).sum() / len(x)
    weight = parameters.reshape(o.shape[1], -1)
    z = o + x @ weight[:, :-1].T + weight[:, -1]
    if labels.ndim == 1:
        loss = -log_softmax(z, axis=1)[np.arange(len(z)), labels.numpy()].sum()
        residual = softmax(z, axis=1) - np.eye(z.shape[1])[labels.numpy()]
    else:
        counted, right = labels.numpy() >= 0, labels.numpy() == 1
        loss = (np.logaddexp(0, np.where(right, -z, z)) * counted).sum()
        residual = (expit(z) - right) * counted
    scale = np.append(np.full(x.shape[1], l2), l2 / spread)
    gradient = np.concatenate([residual.T @ x, residual.sum(axis=0)[:, None]], axis=1) + scale * weight
    return float(loss + (scale * weight**2).sum() / 2), gradient.reshape(-1)


@pytest.mark.parametrize("kind", ["three classes", "two classes", "several classes an image"])
@pytest.mark.parametrize(("count", "width"), [(60, 7), (12, 20)])
@pytest.mark.parametrize("l2", [0.1, 30.0])
def test_a_fit_with_an_offset_is_the_optimum_that_scipy_finds(kind: str, count: int, width: int, l2: float) -> None:
    classes = 2 if kind == "two classes" else 3
    features, offset, labels = examples(count, width, classes)
    fitted, target = offset, labels
    if kind == "two classes":  # a single logit, as in scikit-learn
        fitted, target = offset[:, 1:] - offset[:, :1], labels[:, None]
    if kind == "several classes an image":
        labels = target = (torch.eye(3)[labels] + torch.eye(3)[labels.flip(0)]).clamp(max=1).to(torch.int8)
        labels[0] = -1
    fit = LogisticProblem(features, labels, classes, offset=offset).fit(l2, tolerance=1e-9)
    start = np.zeros(fitted.shape[1] * (width + 1))
    options: Any = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8}
    best = minimize(objective, start, (features, fitted, target, l2), method="L-BFGS-B", jac=True, options=options)
    assert fit.objective == pytest.approx(best.fun, rel=1e-4)
    weight = best.x.reshape(fitted.shape[1], -1)
    bias = weight[:, -1] - weight[:, :-1] @ features.double().mean(dim=0).numpy()
    expected = features.double().numpy() @ weight[:, :-1].T + bias
    scores = fit.scores(features)
    found = scores[:, 1:] - scores[:, :1] if kind == "two classes" else scores
    assert found.numpy() == pytest.approx(expected, abs=0.02)


def test_the_strongest_penalty_leaves_the_offset_alone() -> None:
    features, offset, labels = examples(40, 5, 3)
    scores = LogisticProblem(features, labels, 3, offset=offset).fit(1e9).scores(features)
    assert scores.abs().max() < 1e-4
    unequal = labels.clamp(max=1)  # without an offset the bias is free: the shares of the classes remain
    scores = LogisticProblem(features, unequal, 2).fit(1e9).scores(features)
    assert scores[:, 1] - scores[:, 0] == pytest.approx(np.log(26 / 14), abs=1e-3)


@pytest.mark.parametrize("several", [False, True])
def test_a_class_without_examples_keeps_the_logits_of_its_name(several: bool) -> None:
    features, zero_shot, labels = examples(30, 6, 5)
    labels[labels == 3] = 1
    truth = torch.eye(5)[labels].to(torch.int8) if several else labels
    head = fit_head(features, zero_shot, truth)
    new, names, _ = examples(10, 6, 5, seed=1)
    logits = head.logits(new, names)
    assert torch.equal(logits[:, 3], head.scale * names[:, 3] + head.shift)
    assert not torch.equal(logits[:, 1], head.scale * names[:, 1] + head.shift)


def test_held_out_logits_are_those_of_fits_that_have_not_seen_the_example() -> None:
    features, zero_shot, labels = examples(30, 4, 3)
    head = fit_head(features, zero_shot, labels)
    fold = places_in_classes(labels, 0)[0] % 5
    for number in range(5):
        held, rest = fold == number, fold != number
        problem = LogisticProblem(features[rest], labels[rest], 3, offset=head.scale * zero_shot[rest])
        fit = problem.fit(head.penalty * problem.spread)
        expected = head.scale * zero_shot[held] + fit.scores(features[held])
        assert head.held_out[held].numpy() == pytest.approx(expected.numpy(), abs=0.05)


def test_the_scale_of_zero_shot_and_the_sharpness_have_the_lowest_log_loss() -> None:
    features, zero_shot, labels = examples(30, 4, 3)
    head = fit_head(features, 4 * zero_shot, labels)

    def loss(factor: float, logits: Tensor) -> float:
        return -log_softmax(factor * logits.double().numpy(), axis=1)[np.arange(30), labels.numpy()].sum()

    sharpness = head.sharpness ** (130 / 30)  # which is drawn to 1 as by 100 examples more
    for found, logits, most in ((head.scale, 4 * zero_shot, 1), (sharpness, head.held_out, 10)):
        best = minimize_scalar(loss, bounds=(0, most), args=(logits,), method="bounded", options={"xatol": 1e-9})
        assert found == pytest.approx(best.x, rel=1e-4)
        assert 0.05 < found < most
    several = torch.eye(3)[labels].to(torch.int8)
    platt = fit_head(features, zero_shot, several)
    expected = LogisticRegression(C=1e6).fit(zero_shot.reshape(-1, 1), several.reshape(-1))
    assert platt.scale == pytest.approx(expected.coef_[0, 0], rel=1e-3)
    assert platt.shift == pytest.approx(expected.intercept_[0], rel=1e-3)


def test_names_that_mean_nothing_are_left_out_and_good_ones_stay_in_charge() -> None:
    features, _, labels = examples(40, 6, 4)
    wrong = 5 * torch.eye(4)[(labels + 1) % 4]
    assert fit_head(features, wrong, labels).scale == 0
    few = torch.arange(8)  # two of each class: better than chance is not enough
    chance = 0.3 * torch.eye(4)[labels]
    assert fit_head(features[few], chance[few], labels[few]).scale == 0
    assert fit_head(features[few], chance[few, :][:, [0, 1, 2, 3, 0]], labels[few]).scale > 0  # a class has only a name
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    right = 9 * torch.eye(4)[labels] + torch.randn(40, 4, generator=torch.Generator().manual_seed(4))
    head = fit_head(noise, right, labels)
    assert (head.logits(noise, right).argmax(dim=1) == labels).all()


def test_one_example_a_class_has_the_stated_penalty_and_no_held_out_logits() -> None:
    features, zero_shot, labels = examples(4, 6, 4)
    head = fit_head(features, 9 * torch.eye(4), labels)
    assert (head.penalty, head.sharpness) == (PENALTY, 1)
    assert head.held_out.isnan().all()
    assert fit_head(features, 0 * zero_shot, labels).penalty == PENALTY_ALONE
    unequal = torch.cat([labels, labels[:1]])  # one class has two examples
    rows = [*range(4), 0]
    head = fit_head(features[rows], zero_shot[rows], unequal)
    assert head.held_out.isfinite().all(dim=1).tolist() == [True, False, False, False, True]


def test_examples_of_one_class_alone_are_an_error() -> None:
    features, zero_shot, labels = examples(4, 6, 4)
    with pytest.raises(InputError, match="two classes need examples"):
        fit_head(features, zero_shot, torch.zeros_like(labels))


@pytest.mark.slow
def test_few_shot_heads_see_the_draws_of_the_probes_and_nothing_else() -> None:
    features, zero_shot, labels = examples(120, 6, 3)
    everything = Split(features, Targets(labels, 3), zero_shot)
    train, test = everything.take(torch.arange(60)), everything.take(torch.arange(60, 120))
    found = train_few_shot(train, test, "top1", shots=(1, 4), draws=2)
    for shots, values in found.evaluate_heads(test, "top1").items():
        for draw, value in enumerate(values):
            rows = places_in_classes(labels[:60], draw)[0] < shots
            head = fit_head(features[:60][rows], zero_shot[:60][rows], labels[:60][rows])
            right = head.logits(features[60:], zero_shot[60:]).argmax(dim=1) == labels[60:]
            assert value == pytest.approx(float(right.double().mean()))
    without = train_few_shot(Split(features, everything.targets), test, "top1", shots=(1,), draws=1)
    assert without.evaluate_heads(test, "top1") == {}
