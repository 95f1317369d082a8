"""Any optimiser, any schedule, any rule of weight decay: created, described, resumed, refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from open_clip_train.scheduler import const_lr, const_lr_cooldown
from timm import optim
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from lit_clip.errors import InputError
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import (
    EXCEPT_GAINS_AND_BIASES,
    ExceptGainsAndBiases,
    Optimization,
    PaperAdamW,
    decay_groups,
    state_per_weight,
)
from lit_clip.training.schedules import WarmupConstant, WarmupCosine, WarmupStableDecay, create_schedule
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.ranks_optimizers import CASES, OPTIMIZERS, STEPS
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table

RATE = 0.01


def rates(schedule: Any, steps: int) -> list[float]:
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    made, seen = schedule(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_constant_and_cooldown_are_open_clips(warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = const_lr(optimizer, RATE, warmup, 30)
    assert rates(partial(WarmupConstant, warmup_steps=warmup), 30) == pytest.approx([theirs(s) for s in range(30)])
    theirs = const_lr_cooldown(optimizer, RATE, warmup, 30, 12)
    ours = partial(WarmupStableDecay, cooldown_steps=12, warmup_steps=warmup, total_steps=30)
    assert rates(ours, 30) == pytest.approx([theirs(step) for step in range(30)])


def test_the_steep_cooldown_is_one_minus_the_root_of_its_progress() -> None:
    """Hägele et al. 2024, equation 1."""
    ours = rates(partial(WarmupStableDecay, cooldown_steps=10, warmup_steps=0, shape="1-sqrt", total_steps=30), 30)
    assert ours == pytest.approx([RATE] * 20 + [RATE * (1 - (n / 10) ** 0.5) for n in range(10)])


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return how trainings of some cases on a number of ranks ended, whole and resumed."""
    folder = tmp_path_factory.mktemp("optimizers")
    table, done = write_table(folder, 16), {}

    def get(cases: str, world: int) -> Any:
        if (cases, world) not in done:
            script = str(ROOT / "tests/helpers/ranks_optimizers.py")
            run_lightning_ranks(world, folder, script, "compare", str(folder), str(table), cases, timeout=300)
            done[cases, world] = torch.load(folder / f"{cases}_{world}.pt", weights_only=True)
        return done[cases, world]

    return get


@pytest.mark.parametrize(
    ("cases", "world", "optimizer", "schedule"),
    [(cases, world, *case) for cases, world in (("some", 1), ("more", 1)) for case in CASES[cases]]
    + [
        pytest.param(cases, world, *case, marks=pytest.mark.slow)
        for cases, world in (("some", 2), ("more", 2), ("others", 1))
        for case in CASES[cases]
    ],
)
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_weights_and_moments(
    cases: str, world: int, optimizer: str, schedule: str, ends: Any
) -> None:
    whole, resumed = ends(cases, world)[f"{optimizer} {schedule}"]
    assert whole["steps"] == resumed["steps"] == STEPS
    assert whole["rates"] == resumed["rates"]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
    ours, theirs = resumed["optimizer"]["state"], whole["optimizer"]["state"]
    assert ours.keys() == theirs.keys()
    for number, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(ours[number][name]), torch.as_tensor(value)), (number, name)
    first = make_module().model.state_dict()
    assert not torch.equal(whole["weights"]["visual.conv1.weight"], first["visual.conv1.weight"])


@pytest.mark.parametrize("kinds", [["some", "more"], pytest.param([*CASES], marks=pytest.mark.slow)], ids=" ".join)
def test_optimisers_and_schedules_differ(kinds: list[str], ends: Any) -> None:
    """So that no case above passes because a part was ignored."""
    runs = [each for cases in kinds for each, _ in ends(cases, 1).values()]
    found = [tuple(each["weights"]["visual.proj"].flatten()[:4].tolist()) for each in runs]
    assert len(set(found)) == len(found) == sum(len(CASES[cases]) for cases in kinds)


@pytest.mark.parametrize("cases", ["some", pytest.param("more", marks=pytest.mark.slow)])
def test_two_ranks_train_what_one_trains(cases: str, ends: Any) -> None:
    for name, (two, _) in ends(cases, 2).items():
        one, _ = ends(cases, 1)[name]
        difference = max((two["weights"][key] - value).abs().max().item() for key, value in one["weights"].items())
        # Lion's step is a sign, and Muon computes in bfloat16: both enlarge rounding errors.
        assert difference < (2e-2 if name.startswith(("Lion", "Muon")) else 1e-3), name


def halves(step: int) -> float:
    return 0.5**step


class Rates(Callback):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(folder: Path, table: Path, ckpt_path: Path | None = None, max_epochs: int = 2, **options: Any) -> Any:
    """Train four steps an epoch with a checkpoint after the fifth; return the trainer and the rates."""
    module, recorder = make_module(**options), Rates()
    saving = ModelCheckpoint(folder, "middle", every_n_train_steps=5, enable_version_counter=False)
    trainer = make_trainer(folder, [recorder, *([] if ckpt_path else [saving])], max_epochs=max_epochs)
    trainer.fit(module, data_for(module, table), ckpt_path=ckpt_path, weights_only=True)
    return trainer, recorder.seen


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"), 16)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (partial(StepLR, step_size=2), partial(StepLR, step_size=2)),
        pytest.param(partial(ExponentialLR, gamma=0.9), partial(ExponentialLR, gamma=0.9), marks=pytest.mark.slow),
        pytest.param(partial(CosineAnnealingLR, T_max=8), partial(CosineAnnealingLR, T_max=8), marks=pytest.mark.slow),
        (partial(OneCycleLR, max_lr=0.02), partial(OneCycleLR, max_lr=0.02, total_steps=8)),
        (lambda optimizer: LambdaLR(optimizer, halves), partial(LambdaLR, lr_lambda=halves)),
        (lambda optimizer, total_steps: StepLR(optimizer, total_steps // 2), partial(StepLR, step_size=4)),
    ],
    ids=["StepLR", "ExponentialLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR", "a function of the run's length"],
)
def test_schedules_of_torch_are_stepped_each_step_and_resume(
    schedule: Any, expected: Any, table: Path, tmp_path: Path
) -> None:
    options = {"lr_scheduler": schedule, "optimizer": partial(torch.optim.SGD, lr=RATE, momentum=0.9)}
    _, whole = fit(tmp_path, table, **options)
    assert whole == rates(expected, 8)
    _, resumed = fit(tmp_path, table, tmp_path / "middle.ckpt", **options)
    assert resumed == whole[5:]


def test_a_plateau_lowers_the_rate_when_the_validation_stops_to_improve(table: Path, tmp_path: Path) -> None:
    plateau = partial(ReduceLROnPlateau, mode="max", patience=0)  # a loss that falls is no improvement
    trainer, seen = fit(tmp_path, table, max_epochs=4, lr_scheduler=plateau, optimizer=PaperAdamW)
    assert trainer.global_step == 16
    assert seen[:8] == [5e-4] * 8
    assert seen[-1] < 5e-4
    _, again = fit(
        tmp_path,
        table,
        tmp_path / "middle.ckpt",
        max_epochs=4,
        lr_scheduler=plateau,
        optimizer=partial(PaperAdamW, lr=1e-4),
    )
    assert again == pytest.approx([rate / 5 for rate in seen[16 - len(again) :]])


def test_typed_settings_replace_the_checkpoints_and_others_stay(table: Path, tmp_path: Path) -> None:
    sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9, weight_decay=0.1)
    first, _ = fit(tmp_path, table, optimizer=sgd, lr_scheduler=partial(StepLR, step_size=2))
    changed = partial(torch.optim.SGD, lr=RATE / 4, momentum=0.5, weight_decay=0.1)
    trainer, seen = fit(
        tmp_path, table, tmp_path / "middle.ckpt", optimizer=changed, lr_scheduler=partial(StepLR, step_size=2)
    )
    assert seen == pytest.approx([rate / 4 for rate in rates(partial(StepLR, step_size=2), 8)[5:]])
    (decaying, exempt) = trainer.optimizers[0].param_groups
    assert (decaying["momentum"], decaying["weight_decay"], exempt["weight_decay"]) == (0.5, 0.1, 0.0)
    assert first.optimizers[0].param_groups[0]["momentum"] == 0.9


@pytest.mark.slow
def test_a_cooldown_starts_from_a_checkpoint_of_a_constant_run(table: Path, tmp_path: Path) -> None:
    _, constant = fit(tmp_path, table, max_epochs=8, lr_scheduler=partial(WarmupConstant, warmup_steps=0))
    assert set(constant) == {RATE}
    cooling = partial(WarmupStableDecay, warmup_steps=0, cooldown_steps=4)
    checkpoint = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    done = checkpoint["global_step"]
    assert done % 4  # in the middle of an epoch
    _, cooled = fit(tmp_path, table, tmp_path / "middle.ckpt", max_epochs=done // 4 + 2, lr_scheduler=cooling)
    total = 4 * (done // 4 + 2)
    expected = [RATE * min(1.0, (total - step) / 4) for step in range(done, total)]
    assert cooled == pytest.approx(expected)


SAVED_AT, ADAM = 3, partial(PaperAdamW, lr=RATE)


def stepped(schedule: Any, optimizer: Any, length: int, steps: int) -> tuple[list[float], list[Any]]:
    """Return the rate and the betas of each step."""
    made = create_schedule(schedule, optimizer, length)
    seen, betas = [], []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        made.step()
    return seen, betas


@pytest.mark.parametrize(
    ("there", "here", "length"),
    [
        (partial(WarmupCosine, warmup_steps=1), partial(WarmupCosine, warmup_steps=1), 16),
        (partial(WarmupCosine, warmup_steps=1), partial(WarmupCosine, warmup_steps=6), 8),
        (partial(OneCycleLR, max_lr=0.02), partial(OneCycleLR, max_lr=0.02), 16),
        (partial(CosineAnnealingLR, T_max=8), partial(CosineAnnealingLR, T_max=16), 16),
        (partial(LinearLR, total_iters=8), partial(LinearLR, total_iters=16), 16),
        (partial(StepLR, step_size=2), partial(StepLR, step_size=5), 8),
        (partial(MultiStepLR, milestones=[1, 2]), partial(MultiStepLR, milestones=[5]), 8),
        (partial(ExponentialLR, gamma=0.9), partial(ExponentialLR, gamma=0.5), 8),
        (partial(PolynomialLR, total_iters=8), partial(PolynomialLR, total_iters=16), 8),
        (partial(ConstantLR, total_iters=2), partial(ConstantLR, total_iters=5), 8),
        (partial(CosineAnnealingWarmRestarts, T_0=3), partial(CosineAnnealingWarmRestarts, T_0=5), 8),
        (partial(CosineAnnealingLR, T_max=8), partial(WarmupCosine, warmup_steps=4), 8),
        (partial(WarmupCosine, warmup_steps=4), partial(CosineAnnealingLR, T_max=8), 8),
        (partial(WarmupCosine, warmup_steps=4), partial(OneCycleLR, max_lr=0.02), 8),
        (ReduceLROnPlateau, partial(StepLR, step_size=2), 8),
    ],
)
def test_the_first_resumed_step_has_the_changed_schedules_rate(there: Any, here: Any, length: int) -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"name": "all", "lr": RATE, "weight_decay": 0.1, "params": [nn.Parameter(torch.zeros(2))]}]

    old, new = Optimization(ADAM, there, EXCEPT_GAINS_AND_BIASES), Optimization(ADAM, here, EXCEPT_GAINS_AND_BIASES)
    optimizer = ADAM(groups())
    made = create_schedule(there, optimizer, 8)
    for _ in range(SAVED_AT):
        optimizer.step()
        made.step(*[0.5] * isinstance(made, ReduceLROnPlateau))
    checkpoint = {
        "hyper_parameters": {"rates": None},
        "parts": old.descriptions,
        "global_step": SAVED_AT,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [made.state_dict()],
    }
    resumed = ADAM(groups())
    schedule = create_schedule(here, resumed, length)
    new.resume(checkpoint, groups(), length, "file")
    resumed.load_state_dict(checkpoint["optimizer_states"][0])
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    whole, betas = stepped(here, ADAM(groups()), length, 8)
    seen = []
    for _ in range(SAVED_AT, 8):
        seen.append((resumed.param_groups[0]["lr"], resumed.param_groups[0]["betas"]))
        resumed.step()
        schedule.step()
    assert [rate for rate, _ in seen] == pytest.approx(whole[SAVED_AT:])
    assert [list(each) for _, each in seen] == [pytest.approx(list(each)) for each in betas[SAVED_AT:]]


def test_another_optimiser_cannot_resume(table: Path, tmp_path: Path) -> None:
    fit(tmp_path, table)
    with pytest.raises(InputError, match=r"was trained with .*PaperAdamW, and this run has torch.optim.*SGD; resume"):
        fit(tmp_path, table, tmp_path / "middle.ckpt", optimizer=torch.optim.SGD)


def test_a_checkpoint_that_names_no_optimiser_cannot_resume(table: Path, tmp_path: Path) -> None:
    fit(tmp_path, table)
    checkpoint = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    del checkpoint["parts"]["optimizer"]
    torch.save(checkpoint, tmp_path / "middle.ckpt")
    with pytest.raises(InputError, match="middle.ckpt: parts: lacks optimizer"):
        fit(tmp_path, table, tmp_path / "middle.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "clipping",
    [{"gradient_clip_val": 0.1}, pytest.param({}, marks=pytest.mark.slow)],
    ids=["clipped", "not clipped"],
)
def test_fused_adamw_learns_as_the_plain_one_does(
    clipping: dict[str, Any], precision: str, table: Path, tmp_path: Path
) -> None:
    losses = {}
    for fused in (None, False):  # unless it is set, fit sets it
        torch.manual_seed(0)
        recorder = Losses()
        module = make_module(optimizer=partial(_adamw, fused=fused))
        trainer = make_trainer(tmp_path, [recorder], max_steps=6, precision=precision, **clipping)
        trainer.fit(module, data_for(module, table))
        assert all(bool(group["fused"]) is (fused is None) for group in trainer.optimizers[0].param_groups)
        losses[fused] = recorder.seen
    assert len(losses[None]) == 6
    assert losses[None][-1] != losses[None][0]
    assert losses[None] == pytest.approx(losses[False], rel=1e-6 if precision == "32-true" else 1e-3)


class Losses(Callback):
    """Record every step's loss."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def _adamw(params: Any, fused: bool | None) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=fused)


def test_torchs_optimisers_are_fused_under_clipping_too(table: Path, tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        module = make_module(optimizer=partial(torch.optim.SGD, lr=RATE))
        trainer = make_trainer(tmp_path, [], max_steps=2, gradient_clip_val=0.5, precision=precision)
        trainer.fit(module, data_for(module, table))
        assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
    module = make_module(optimizer=partial(torch.optim.SGD, lr=RATE, foreach=True))
    trainer = make_trainer(tmp_path, [], max_steps=2)
    trainer.fit(module, data_for(module, table))
    assert not any(group["fused"] for group in trainer.optimizers[0].param_groups)


def test_torchs_muon_names_the_one_that_takes_all_parameters(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.optimizer: Muon only supports 2D.*timm.optim.Muon takes all"):
        fit(tmp_path, table, optimizer=torch.optim.Muon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=-1)}, "model.optimizer: Invalid learning rate: -1"),
        (
            {"optimizer": partial(torch.optim.SGD, **{"rate": 1})},
            "model.optimizer: .*unexpected keyword argument 'rate'",
        ),
        ({"optimizer": partial(optim.Adafactor, lr=None)}, "model.optimizer: Adafactor has no learning rate; set"),
        ({"optimizer": list}, "model.optimizer: creates a list, not a torch optimiser"),
        ({"lr_scheduler": StepLR}, "model.lr_scheduler: .*missing 1 required positional argument: 'step_size'"),
        ({"lr_scheduler": lambda optimizer: 3}, "model.lr_scheduler: creates a int, not a learning rate schedule"),
        ({"lr_scheduler": lambda optimizer: WarmupCosine(optimizer, 3)}, "total_steps is not set.*functools.partial"),
        ({"lr_scheduler": partial(WarmupConstant, warmup_steps=-1)}, "^model.lr_scheduler.warmup_steps: -1"),
        (
            {"lr_scheduler": partial(WarmupStableDecay, cooldown_steps=1, **{"shape": "x"})},
            "'x' must be 'linear' or '1-sqrt'",
        ),
    ],
)
def test_wrong_parts_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_module(**options)


def test_a_checkpoint_imports_no_class_but_ours_torchs_and_timms(table: Path, tmp_path: Path) -> None:
    """Whoever writes a checkpoint could otherwise run any module that can be imported."""
    path = tmp_path / "middle.ckpt"
    own = type("Own", (torch.optim.SGD,), {"__module__": "my_optimizers"})
    fit(tmp_path, table, optimizer=partial(own, lr=RATE))
    assert torch.load(path, weights_only=True)["parts"]["optimizer"]["class_path"] == "my_optimizers.Own"
    module = LitCLIP.load_from_checkpoint(path)  # for use: nothing is imported, and no part is built from the file
    assert module.parts["optimizer"]["class_path"] == "lit_clip.training.optimizers.PaperAdamW"
    with pytest.raises(InputError, match=r"trained with model.optimizer my_optimizers.Own, and this run has lit_clip"):
        make_trainer(tmp_path, [], max_steps=3).fit(module, data_for(module, table), ckpt_path=path)


@pytest.mark.parametrize(
    ("optimizer", "number"),
    [(PaperAdamW, 2), (torch.optim.SGD, 0), (OPTIMIZERS["SGD"], 1), (optim.Lion, 1), (torch.optim.LBFGS, None)],
)
def test_moments_are_counted_by_a_step(optimizer: Any, number: int | None) -> None:
    assert state_per_weight(optimizer) == number


class WithPositionBias(nn.Module):
    """Parameters named and shaped as in Swin and MPNet."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.relative_attention_bias = nn.Embedding(32, 2)
        self.ln_table = nn.Parameter(torch.zeros(2, 2))
        self.proj = nn.Linear(2, 2)


def test_tables_of_position_biases_do_not_decay_and_the_rule_can_be_given() -> None:
    module = WithPositionBias()
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def decaying(*rule: Any) -> list[str]:
        return [names[id(p)] for p in decay_groups(module.named_parameters(), 0.1, *rule)[0]["params"]]

    assert decaying() == ["ln_table", "proj.weight"]
    assert decaying(ExceptGainsAndBiases(["bias", "ln"])) == ["proj.weight"]
    assert decaying(lambda name, parameter: "table" in name) == ["relative_position_bias_table", "ln_table"]
    own = make_module(decay=lambda name, parameter: name == "visual.proj")
    decayed = [group for group in own.optimization.groups(own) if group["weight_decay"]]
    assert [len(group["params"]) for group in decayed] == [1]
