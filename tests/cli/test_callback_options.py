"""Options of one callback of several, by the name of its class."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace, dict_to_namespace

from lit_clip.cli.callback_options import PREFIX, Typed, take_options, with_options
from lit_clip.errors import InputError
from tests.cli.test_configurations import WORDS

Cli = Callable[..., CompletedProcess[str]]
KEEPER = "lightning.pytorch.callbacks.ModelCheckpoint"
LISTED = [
    {"class_path": "callbacks.EMA", "init_args": {"decay": 0.99}},
    {"class_path": KEEPER, "init_args": {"filename": "last"}},
    "callbacks.PatchDropout",
    {"class_path": KEEPER, "init_args": {"filename": "best"}},
]


class NonFiniteSteps:
    """Stands for a callback that every run has."""


def read(callback: Any) -> Namespace:
    """Return a callback's settings as a parser has read them."""
    return dict_to_namespace(callback if isinstance(callback, dict) else {"class_path": callback})


def result(callbacks: Any, *words: str) -> list[dict[str, Any]]:
    rest, taken = take_options(words)
    assert rest == []
    given = [read(each) for each in callbacks] if isinstance(callbacks, list) else callbacks and read(callbacks)
    return [each.as_dict() for each in with_options(given, taken, [NonFiniteSteps()])]


def test_an_option_reaches_the_callback_that_it_names_and_leaves_the_others() -> None:
    words = [f"{PREFIX}.EMA.decay", "0.9", f"{PREFIX}.ModelCheckpoint.2.filename=newest", f"{PREFIX}.EMA.start_step=3"]
    first, second, third, fourth = result(LISTED, *words)
    assert first["init_args"] == {"decay": "0.9", "start_step": "3"}
    assert [second["init_args"]["filename"], fourth["init_args"]["filename"]] == ["last", "newest"]
    assert third == {"class_path": "callbacks.PatchDropout"}
    assert result(LISTED[0], f"{PREFIX}.EMA.decay", "0.5")[0]["init_args"] == {"decay": "0.5"}  # the only one
    (added,) = result(None, f"{PREFIX}.NonFiniteSteps.policy.after", "3")
    assert added["init_args"] == {"policy": {"after": "3"}}


def test_a_callback_is_taken_out_by_its_name() -> None:
    found = result(
        LISTED, f"{PREFIX}-=EMA", f"{PREFIX}-", "ModelCheckpoint.1", f"{PREFIX}.ModelCheckpoint.2.filename=a"
    )
    assert found == [{"class_path": "callbacks.PatchDropout"}, {"class_path": KEEPER, "init_args": {"filename": "a"}}]
    assert result(LISTED[:1], f"{PREFIX}-=callbacks.EMA") == []
    without = {"class_path": "lit_clip.callbacks.Without", "init_args": {"names": ["NonFiniteSteps"]}}
    given = {"class_path": "callbacks.NonFiniteSteps", "init_args": {"policy": "skip"}}
    assert result([LISTED[0]], f"{PREFIX}-=NonFiniteSteps") == [LISTED[0], without]
    assert result([given, LISTED[0]], f"{PREFIX}-=NonFiniteSteps") == [LISTED[0], without]  # nor the default one
    again = result([LISTED[0], without], f"{PREFIX}.EMA.start_step=1")
    assert again == [{**LISTED[0], "init_args": {"decay": 0.99, "start_step": "1"}}, without]  # pyright: ignore
    written = {**without, "class_path": "callbacks.Without"}
    assert result([written, LISTED[0]], f"{PREFIX}-=EMA") == [without]
    rest, taken = take_options([f"{PREFIX}+=callbacks.EMA", f"{PREFIX}-=PatchDropout", f"{PREFIX}.decay", "0.9"])
    assert (len(rest), len(taken)) == (3, 1)  # the options of the callback that was typed before still follow it
    for word in (f"{PREFIX}+=callbacks.EMA", f"{PREFIX}.EMA.decay=0.9"):
        with pytest.raises(InputError, match="takes out what another option adds or sets"):
            take_options([f"{PREFIX}-=EMA", word])


def test_options_that_follow_a_typed_callback_stay_the_parsers() -> None:
    words = [
        f"{PREFIX}.EMA.start_step=1",
        f"{PREFIX}+=callbacks.EMA",
        f"{PREFIX}.decay",
        "0.9",
        f"{PREFIX}.help",
        "EMA",
    ]
    assert take_options(["fit", *words]) == (["fit", *words[1:]], [Typed(f"{PREFIX}.EMA.start_step", "1")])


@pytest.mark.parametrize(
    ("callbacks", "option", "message"),
    [
        (LISTED, "decay", "names none of the callbacks, which are EMA, ModelCheckpoint.1, PatchDropout, ModelCheck"),
        (LISTED, "decay", rf"did you mean {PREFIX}.EMA.decay\?$"),
        (LISTED[:1], "decay", rf"did you mean {PREFIX}.EMA.decay\?$"),
        (LISTED, "EMAs.decay", rf"{PREFIX}.EMAs.decay: names none .*; did you mean {PREFIX}.EMA.decay\?$"),
        (LISTED, "filename", rf"did you mean {PREFIX}.ModelCheckpoint.1.filename or {PREFIX}.ModelCheckpoint.2.file"),
        (LISTED, "ModelCheckpoint.filename", r"did you mean --trainer.callbacks.ModelCheckpoint.\d.filename\?$"),
        (LISTED, "EMA.decy", r"EMA has no such option; there are decay, start_step; did you mean decay\?$"),
        (None, "share", "names none of the callbacks, which are NonFiniteSteps; add it before, .*=CLASS$"),
        (LISTED, "-EMAs", r"callbacks-=EMAs: there is none; there are EMA, ModelCheckpoint.1, .*; did you mean EMA\?$"),
        (LISTED, "-ModelCheckpoint", r"there are EMA, ModelCheckpoint.1, PatchDropout, ModelCheckpoint.2, NonFinite"),
        (LISTED, "Throughput.x", r"; add it before, --trainer.callbacks\+=callbacks.Throughput$"),
    ],
)
def test_an_option_that_names_no_callback_or_several_is_one_line_with_candidates(
    callbacks: Any, option: str, message: str
) -> None:
    words = [f"{PREFIX}-={option[1:]}"] if option[0] == "-" else [f"{PREFIX}.{option}", "0.9"]
    with pytest.raises(InputError, match=message):
        result(callbacks, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{PREFIX}.EMA.decay.x", "3"], r"EMA.decay.x: decay is one value, without options; set it itself$"),
        ([f"{PREFIX}.EMA.decay", "--print_config"], r"EMA.decay: has no value; type one after it$"),
        ([f"{PREFIX}.EMA.decay"], r"EMA.decay: has no value; type one after it$"),
        ([f"{PREFIX}-"], r"callbacks-: has no value; type one after it$"),
    ],
)
def test_an_option_without_a_value_or_without_a_place_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        result(LISTED[:2], *words)


def test_the_later_of_two_options_of_one_callback_wins() -> None:
    (found,) = result(LISTED[0], f"{PREFIX}.EMA.decay", "0.5", f"{PREFIX}.EMA.decay", "0.6")
    assert found["init_args"] == {"decay": "0.6"}
    rest, taken = take_options([f"{PREFIX}.EMA.decay=0.5", f"{PREFIX}+=callbacks.Other", f"{PREFIX}.decay", "0.6"])
    assert (len(rest), len(taken)) == (3, 1)  # of another callback


def test_options_reach_callbacks_of_configs_and_defaults_and_are_saved(
    cli: Cli, in_process: Cli, caption_table: Path, tmp_path: Path
) -> None:
    config, reference = tmp_path / "two.yaml", "${oc.env:FILE_NAME}"
    listed = [LISTED[0], {"class_path": KEEPER, "init_args": {"filename": reference}}]
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}), encoding="utf-8")
    words = [word for word in WORDS if "--trainer.callbacks+" not in word]
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table), "--config", str(config)]
    options = [f"{PREFIX}.EMA.decay", "0.5", f"{PREFIX}.NonFiniteSteps.policy=skip"]
    more = [f"{PREFIX}+=callbacks.SimilarityMatrix", f"{PREFIX}.pairs", "3"]
    run = cli("fit", *words, *data, *more, *options, environment={"FILE_NAME": "from_outside"})
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.rglob("from_outside.ckpt"))  # although an option changes the list
    saved = yaml.safe_load((tmp_path / "runs/mine/version_0/fit_config.yaml").read_text(encoding="utf-8"))
    found = {each["class_path"].rpartition(".")[2]: each["init_args"] for each in saved["trainer"]["callbacks"]}
    assert list(found) == ["EMA", "ModelCheckpoint", "SimilarityMatrix", "NonFiniteSteps"]
    assert (found["EMA"]["decay"], found["SimilarityMatrix"]["pairs"]) == (0.5, 3)
    assert found["NonFiniteSteps"]["policy"] == "skip"
    assert found["ModelCheckpoint"]["filename"] == reference
    refused = in_process("fit", *words, *data, f"{PREFIX}.decay", "0.5")
    assert refused.returncode == 2
    assert f"{PREFIX}.decay: names none of the callbacks, which are EMA, ModelCheckpoint, Pre" in refused.stderr
    wrong = in_process("fit", *words, *data, f"{PREFIX}.EMA.decay", "much")
    assert "trainer.callbacks.EMA.decay: wants float, not much" in wrong.stderr


def test_callbacks_that_are_taken_out_stay_out_of_the_saved_settings_and_of_a_resumed_run(
    cli: Cli, in_process: Cli, caption_table: Path, tmp_path: Path
) -> None:
    """One of the configuration, one that every run has; each would leave a trace in the output."""
    config = tmp_path / "two.yaml"
    keeper = {"class_path": KEEPER, "init_args": {"filename": "last", "save_last": False}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [LISTED[0], keeper]}}), encoding="utf-8")
    words = [word for word in WORDS if "--trainer.callbacks+" not in word]
    words += ["--data.train", str(caption_table), "--data.val", str(caption_table), "--config", str(config)]
    minus = [f"{PREFIX}-=EMA", f"{PREFIX}-=PrintPlan"]
    run = cli("fit", *words, *minus)
    assert run.returncode == 0, run.stderr
    assert "pairs per step" not in run.stdout + run.stderr  # in the plan
    folder = tmp_path / "runs/mine/version_0"
    saved = yaml.safe_load((folder / "fit_config.yaml").read_text(encoding="utf-8"))
    found = {each["class_path"].rpartition(".")[2]: each["init_args"] for each in saved["trainer"]["callbacks"]}
    assert list(found) == ["ModelCheckpoint", "Without"]
    assert found["Without"] == {"names": ["PrintPlan"]}
    again = in_process(
        "fit", "--config", str(folder / "fit_config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"
    )
    assert again.returncode == 0, again.stderr
    assert "pairs per step" not in again.stdout + again.stderr
    refused = in_process("fit", *words, f"{PREFIX}-=PrintPlans")
    assert refused.returncode == 2
    assert (
        "callbacks-=PrintPlans: there is none; there are EMA, ModelCheckpoint, Preemption, PrintPlan" in refused.stderr
    )
