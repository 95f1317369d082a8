"""The contract of a loss: every loss, ours or a user's, equals a plain loop on any number of ranks."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from callbacks import EMA
from datamodules import Captions
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Loss, LossValue, Matryoshka, Sigmoid, Sum, WholeBatch
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import make_batch, make_module
from tests.helpers.ranks_losses import CASES, COUNTS, PARTS_ELSEWHERE, save_teacher
from tests.test_module import data_for, trainer


@pytest.mark.parametrize(
    ("world", "parts"),
    [
        (1, ["each step"]),
        (3, ["features", "own step"]),
        # Three ranks have all that one and two have.
        pytest.param(1, ["features"], marks=pytest.mark.slow),
        pytest.param(2, ["features", "each step"], marks=pytest.mark.slow),
        pytest.param(3, ["each step"], marks=pytest.mark.slow),
    ],
)
def test_value_and_gradients_equal_a_plain_loop_over_all_pairs(
    world: int, parts: list[str], ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Gradients of features, scale, bias and a loss's own parameters, and of the model after a DDP step.

    Cases and loops are in ``helpers/ranks_losses.py``: uneven pairs, a rank without pairs, micro-batches, hard
    negatives.
    """
    teacher = save_teacher(tmp_path)
    ranks("losses", world, str(tmp_path / "errors.json"), teacher, *parts, script="ranks_losses.py")
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    steps = len(CASES) - len(PARTS_ELSEWHERE) * ("own step" in parts) if parts != ["features"] else 0
    assert len(errors) == len(CASES) * len(COUNTS[world]) * ("features" in parts) + steps
    assert max(errors.values()) < 1e-8, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_a_step_gathers_the_texts_once_and_reduces_their_gradient_once(
    ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Four collectives of the softmax loss and two of the sigmoid loss; duplicates take one or two more to find."""
    ranks("collectives", 2, str(tmp_path / "names.json"), script="ranks_losses.py")
    found = json.loads((tmp_path / "names.json").read_text(encoding="utf-8"))
    one, two = ["allgather_base"], ["allreduce", "allreduce"]  # the second pair is a log-sum-exp
    for counts, scatter in (((4, 4), "reduce_scatter_base"), ((5, 3), "allreduce")):
        for policy, ids in {"negatives": 0, "ignored": 1, "positives": 2}.items():
            softmax = one * (1 + ids) + two
            assert found[f"softmax {policy}, {counts}"] == [*softmax, scatter]
            with_hard = found[f"softmax {policy}, hard negatives, {counts}"]
            assert with_hard[:-1] == [*softmax, *one, scatter]
            assert with_hard[-1] in ("reduce_scatter_base", "allreduce")
            assert found[f"sigmoid {policy}, {counts}"] == [*one * (1 + min(ids, 1)), scatter]


# A loss in a training run: what is checked, logged, saved and resumed.


class Tempered(Loss):
    """A user's loss with a temperature and channel weights of its own; it does not use the model's."""

    def __init__(self, initial: float = 2.0) -> None:
        super().__init__()
        self.log_scale, self.weight = nn.Parameter(torch.tensor(initial)), nn.Parameter(torch.ones(32, 1))

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        logits = self.log_scale.exp() * (pairs.image * self.weight[: pairs.image.shape[1], 0]) @ pairs.text.T
        return F.cross_entropy(logits, torch.arange(len(logits)))


class Returns(Loss):
    """Returns whatever it was given."""

    def __init__(self, result: Callable[[WholeBatch], Any]) -> None:
        super().__init__()
        self.result = result

    def whole_batch(self, pairs: WholeBatch) -> Any:
        return self.result(pairs)


def fit(config: CLIPConfig, table: Path, folder: Path, ema: bool, resume: str | None = None) -> LitCLIP:
    """Train 6 steps in epochs of 4, with a checkpoint after each third step."""
    torch.manual_seed(0)
    loss = Sum([Contrastive(), Tempered(1.0 if resume else 2.0)])  # what a resumed run starts from must not matter
    module = LitCLIP(
        config, loss=loss, optimizer=partial(PaperAdamW, lr=1e-2), lr_scheduler=partial(WarmupCosine, warmup_steps=1)
    )
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fitting = trainer(folder, max_steps=6, callbacks=[saving, *([EMA(0.5)] if ema else [])])
    fitting.fit(module, data_for(module, table), ckpt_path=resume)
    return module


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_resumed_inside_an_epoch_ends_with_the_same_bits_of_the_losss_own_parameters(
    ema: bool, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    whole = fit(tiny_config, caption_table, tmp_path / "whole", ema)
    resumed = fit(tiny_config, caption_table, tmp_path / "resumed", ema, str(tmp_path / "whole/step=3.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    found = whole.state_dict()["loss.terms.1.log_scale"]
    assert found not in (1.0, 2.0)
    groups = [group["name"] for group in whole.optimization.groups(whole)]
    assert groups[-2:] == ["loss", "loss, no decay"]
    checkpoint = torch.load(tmp_path / "whole/step=6.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == whole.model.state_dict().keys()
    assert torch.equal(checkpoint["loss"]["terms.1.log_scale"], found)
    assert checkpoint["parts"]["loss"]["init_args"]["terms"][1]["class_path"] == f"{__name__}.Tempered"


def test_a_checkpoint_names_its_loss_and_a_run_with_another_one_is_refused(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    fit(tiny_config, caption_table, tmp_path, ema=False)
    path = tmp_path / "step=6.ckpt"
    loaded = LitCLIP.load_from_checkpoint(path)
    assert isinstance(loaded.loss, Contrastive)  # the default; a part is never built from a file
    data = data_for(loaded, caption_table)
    optimizer = partial(PaperAdamW, lr=1e-2)
    for loss in (None, Contrastive(), Sum([Contrastive(), Contrastive()])):
        module = LitCLIP(
            tiny_config, loss=loss, optimizer=optimizer, lr_scheduler=partial(WarmupCosine, warmup_steps=1)
        )
        with pytest.raises(InputError, match=r"trained with model.loss \S+Sum of \S+ of \S+Tempered, and this run has"):
            trainer(tmp_path, max_steps=8).fit(module, data, ckpt_path=path)
        trainer(tmp_path).validate(module, data, ckpt_path=path, verbose=False)  # needs no training loss


def test_a_loss_is_described_by_its_arguments() -> None:
    loss = Matryoshka(Sum([Contrastive("positives"), Sigmoid()], weights=[1, 0.5]), [4, 8])
    described = loss.describe()
    assert described == {
        "class_path": "lit_clip.losses.combined.Matryoshka",
        "init_args": {
            "dims": [4, 8],
            "loss": {
                "class_path": "lit_clip.losses.combined.Sum",
                "init_args": {
                    "terms": [
                        {
                            "class_path": "lit_clip.losses.pairwise.Contrastive",
                            "init_args": {"duplicates": "positives", "label_smoothing": 0.0},
                        },
                        {"class_path": "lit_clip.losses.pairwise.Sigmoid", "init_args": {"duplicates": "negatives"}},
                    ],
                    "weights": [1, 0.5],
                },
            },
            "weights": [1.0, 1.0],
        },
    }
    assert copy.deepcopy(loss).describe() == pickle.loads(pickle.dumps(loss)).describe() == described


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda pairs: (pairs.image * pairs.text).sum(dim=1), r" returned a tensor of shape \[4\]; return a scalar"),
        (lambda pairs: 1.0, " returned 1.0; return a scalar tensor, such as the mean"),
        (lambda pairs: pairs.image.detach().sum(), " returned a loss without gradient"),
        (lambda pairs: LossValue(pairs.image.sum(), {"each": pairs.image}), ": its metric each is not a number"),
    ],
)
def test_a_loss_that_returns_no_scalar_is_named(result: Callable[[WholeBatch], Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"model.loss: tests\.losses\.test_loss\.\S*{message}"):
        make_module(loss=Returns(result)).training_step(make_batch(slice(0, 4)), 0)
    if "shape" in message:
        with pytest.raises(InputError, match=message):  # within another loss too
            make_module(loss=Matryoshka(Returns(result), [8])).training_step(make_batch(slice(0, 4)), 0)


def test_what_a_loss_returns_is_logged() -> None:
    inner = Sum([Contrastive(), Contrastive("ignored"), Tempered()], [1, 2, 3])
    module, logged = make_module(loss=Matryoshka(inner, [4, 16])), {}
    module.log = lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
    module.training_step(make_batch(slice(0, 8)), 0)
    terms = [logged[f"train/{name}"] for name in ("contrastive_loss", "contrastive_loss_2", "tempered_loss")]
    assert logged["train/loss_16"] == pytest.approx(sum(w * x for w, x in zip((1, 2, 3), terms, strict=True)))
    assert logged["train/loss"] == pytest.approx(logged["train/loss_4"] + logged["train/loss_16"])
    assert logged["train/in_batch_chance"] == 1 / 8
    assert 0 <= logged["train/in_batch_accuracy"] <= 1


def test_the_default_loss_is_that_of_the_architecture(tiny_config: CLIPConfig) -> None:
    with_bias = replace(tiny_config, logit_bias=True)
    assert isinstance(LitCLIP(tiny_config).loss, Contrastive)
    assert isinstance(LitCLIP(with_bias).loss, Sigmoid)
    LitCLIP(with_bias, loss=Contrastive()).setup("fit")
    with pytest.raises(InputError, match="Sigmoid needs a model with a logit_bias"):
        LitCLIP(tiny_config, loss=Sum([Sigmoid()])).setup("fit")


@pytest.mark.parametrize(
    ("bias", "loss", "warns"),
    [
        (-16.5, None, True),
        (-16.5, Sigmoid(pretraining_batch=32_768), False),
        (-16.5, Contrastive(), False),
        (-9.0, None, False),
    ],
)
def test_a_published_siglips_bias_in_a_small_batch_is_named_unless_the_loss_knows(
    bias: float, loss: Loss | None, warns: bool, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    model = CLIP(replace(tiny_config, logit_bias=True))
    assert model.logit_bias is not None
    nn.init.constant_(model.logit_bias, bias)
    save(model, tmp_path / "siglip.ckpt", {})
    module = LitCLIP(pretrained=tmp_path / "siglip.ckpt", loss=loss, optimizer=partial(PaperAdamW, lr=0.0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data_for(module, caption_table))
    told = [str(each.message) for each in found if "model.loss.pretraining_batch" in str(each.message)]
    assert len(told) == warns
    assert not told or "logit_bias -16.5 was learned with far larger batches than this one of 16 pairs" in told[0]
    assert module.model.logit_bias == bias  # it stays that of pretraining


@pytest.mark.parametrize(
    ("loss", "batch", "warns"),
    [
        (Contrastive(), 1, True),
        (Contrastive(), 2, False),
        (Sum([Contrastive(), Matryoshka(Contrastive(), [8])]), 1, True),
    ],
)
def test_a_step_of_one_pair_is_told_before_training(
    loss: Loss, batch: int, warns: bool, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config, loss=loss)
    data = Captions(str(caption_table), str(caption_table), batch_size=batch, num_workers=0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    assert any("data.batch_size: a step has one pair" in str(each.message) for each in found) == warns


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrastive(label_smoothing=1.0), "label_smoothing: 1.0 must be at least 0 and below 1"),
        (lambda: Contrastive("positives", 0.1), "label_smoothing 0.1 needs duplicates: negatives, not positives"),
        (lambda: Contrastive("positive"), "duplicates 'positive' must be one of negatives, positives, ignored"),  # pyright: ignore[reportArgumentType]  # a typing error
        (lambda: Sigmoid("ignore"), "duplicates 'ignore' must be one of negatives, positives, ignored"),  # pyright: ignore[reportArgumentType]  # a typing error
        (lambda: Sigmoid(pretraining_batch=0), "Sigmoid.pretraining_batch 0 must be at least 1"),
        (lambda: Sum([]), "Sum needs at least one of its terms"),
        (lambda: Sum([Contrastive()], [1, 2]), "Sum has 2 weights for 1 terms; give one for each"),
        (lambda: Matryoshka(Contrastive(), [0]), r"Matryoshka.dims \[0\] must be at least 1"),
        (lambda: LitCLIP("ViT-tiny-16-64", loss=Matryoshka(Contrastive(), [4000])).setup("fit"), "the features have"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


class Forgetful(Loss):
    """Does not call ``super().__init__()``."""

    def __init__(self) -> None:
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        return -(self.scale * pairs.image * pairs.text).sum(dim=1).mean()


def test_a_loss_need_not_call_the_constructor_of_its_base() -> None:
    loss = Forgetful()
    assert [name for name, _ in loss.named_parameters()] == ["scale"]
    assert loss.describe()["init_args"] == {}


@pytest.mark.parametrize("loss", [Forgetful, torch.nn.Identity(), len], ids=["a class", "a module", "a function"])
def test_what_is_no_loss_is_refused_at_construction(loss: Any, tiny_config: CLIPConfig) -> None:
    with pytest.raises(InputError, match="model.loss: .* is no loss; pass an object of a subclass"):
        LitCLIP(tiny_config, loss=loss)


class Misspelt(Loss):
    def whole_bach(self, pairs: WholeBatch) -> Tensor:
        return pairs.scale


def test_a_loss_that_overrides_nothing_says_what_to_override() -> None:
    with pytest.raises(InputError, match=r"test_loss.Misspelt must override whole_batch, or forward"):
        Misspelt().whole_batch(cast(Any, None))
