"""Every row of the table has the outcome that it states, and everything that Lightning exports has a row."""

import inspect
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, callbacks, loggers, plugins, profilers, strategies
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.tuner import Tuner

from benchmarks.combinations.page import PAGE, REFUSED_THEN, ROWS_RUN, main, page
from benchmarks.combinations.runs import examine
from benchmarks.combinations.table import ELSEWHERE, OWN, PLAIN, ROWS, Row
from callbacks import compile as compiling
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.tools.messages import user_error
from lit_clip.training.checks import REFUSED, Refusal, check_parts
from tests.conftest import ROOT, made_once
from tests.helpers import forks
from tests.helpers.small_sets import captions_entry, entry, write_suite, write_table

SCRIPT = str(ROOT / "benchmarks/combinations/runs.py")
TIME_LIMIT = 240  # for a busy machine; strategies that start new interpreters take a minute there


def start(row: Row, name: str, folder: Path, base: Path) -> None:
    """Run a row in its processes; all must exit with 0 in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [SCRIPT, name, str(row.world), str(folder), str(base / "captions.csv"), str(base / "plain.pt")]
    variables = {**os.environ, "COLUMNS": "200", "COMBINATION_PAIRS": str(base / "captions.csv")}
    if row.world > 1 and not row.launched:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(row.world)}
        variables |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(row.world), "TORCHELASTIC_RUN_ID": "test"}
        places = [{"RANK": str(rank)} for rank in range(row.world)]
    else:
        places = [{}]
    programs = [forks.Program(forks.script, words, folder, variables | place | row.environment) for place in places]
    for done in forks.run(programs, TIME_LIMIT):
        assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sixteen pairs and the weights of the plain run."""

    def make(folder: Path) -> None:
        write_table(folder, 16)
        shades = {"class_path": "tests.helpers.small_sets.Shades"}
        grids = {"class_path": "datamodules.evaluation.ImageGrids", "init_args": {"root": "shades", "images": shades}}
        grids["init_args"] |= {"side": 24}
        write_suite(folder, shades=entry(), pairs=captions_entry(), grids={"data": grids, "metric": "accuracy"})
        start(PLAIN, "plain", folder, folder)

    return made_once(tmp_path_factory, "combinations", make)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.group}: {row.name}, {row.world}", marks=[] if row.quick else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_a_row_has_the_outcome_it_states(row: Row, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.refused and row.world == 1:  # before anything has begun, so this process can refuse it as well
        monkeypatch.setenv("COMBINATION_PAIRS", str(base / "captions.csv"))
        monkeypatch.setattr(compiling, "compile_blocks", compiling.compile_blocks)  # is replaced for some rows
        examine(row, tmp_path, str(base / "captions.csv"), {})
    else:
        start(row, row.name, tmp_path, base)
    shutil.rmtree(tmp_path)  # all rows together would leave 70 GB of checkpoints


def exported() -> set[str]:
    """Return the names of everything that Lightning exports to be combined."""
    modules = (callbacks, loggers, plugins, profilers, strategies)
    names = {name for module in modules for name in module.__all__}
    names |= set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    names |= {f"Tuner.{name}" for name in vars(Tuner) if not name.startswith("_")}
    return names | set(strategies.StrategyRegistry.available_strategies())


def test_everything_that_lightning_exports_has_a_row() -> None:
    """A new version of Lightning fails here by the names of what is new."""
    known = {name for names in ELSEWHERE.values() for name in names}
    known |= {refusal.kind.__name__ for refusal in REFUSED}
    for row in ROWS:
        known |= {*row.covers, *re.findall(r"\w+", row.name)}
    assert sorted(exported() - known) == []


def test_every_callback_of_ours_has_a_row() -> None:
    names = " ".join(row.name for row in ROWS)
    assert [name for name in OWN if f"callbacks.{name}" not in names] == []


def test_no_row_is_there_twice() -> None:
    keys = [(row.name, row.world) for row in ROWS]
    assert len(keys) == len(set(keys))


def test_the_page_counts_the_rows_that_were_run() -> None:
    """Run all rows before you change the numbers."""
    assert (len(ROWS), sum(bool(row.refused) for row in ROWS)) == (ROWS_RUN, REFUSED_THEN)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.combinations.page"


def test_the_listing_has_each_setting_once(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows"])
    listed = re.findall(r"^\| `(.+?)` \|", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted({row.name for row in ROWS})


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.kind.__name__)
def test_a_part_is_refused_with_one_line_that_says_why_and_what_instead(refusal: Refusal) -> None:
    """Also parts that need hardware or packages which are not here."""
    part: Any = object.__new__(refusal.kind)
    place = "callbacks" if isinstance(part, Callback) else "strategy" if isinstance(part, Strategy) else "plugins"
    plugin = part if place == "plugins" else None
    strategy = part if place == "strategy" else SimpleNamespace(checkpoint_io=plugin, precision_plugin=plugin)
    trainer = SimpleNamespace(callbacks=[part] if place == "callbacks" else [], strategy=strategy, world_size=2)
    with pytest.raises(InputError) as error:
        check_parts(trainer)
    assert str(error.value) == f"trainer.{place}: {refusal.kind.__name__} {refusal.why}; {refusal.instead}"


@pytest.mark.parametrize("method", ["lr_find", "scale_batch_size"])
def test_the_tuner_is_refused_with_one_line_and_leaves_a_trainer_that_fits(
    method: str, tiny_config: CLIPConfig, base: Path, tmp_path: Path
) -> None:
    module, data = LitCLIP(tiny_config), Captions(str(base / "captions.csv"), batch_size=4, num_workers=0)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"^trainer.callbacks: \w+Finder would .*; .*set model\."):
        getattr(Tuner(trainer), method)(module, datamodule=data)
    trainer.fit(module, data)
    assert trainer.global_step == 1


def test_a_batch_size_finder_changes_no_result_of_a_validation(
    tiny_config: CLIPConfig, base: Path, tmp_path: Path
) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    module, pairs = LitCLIP(tiny_config), str(base / "captions.csv")
    found = [
        Trainer(**quiet, callbacks=each).validate(module, Captions(pairs, pairs, batch_size=4, num_workers=0))
        for each in ([], [callbacks.BatchSizeFinder(max_trials=2)])
    ]
    assert found[0][0] == pytest.approx(found[1][0])


def test_a_metric_that_early_stopping_does_not_find_is_one_line(
    tiny_config: CLIPConfig, base: Path, tmp_path: Path
) -> None:
    module, data = LitCLIP(tiny_config), Captions(*[str(base / "captions.csv")] * 2, batch_size=4, num_workers=0)
    stopping = callbacks.EarlyStopping("val/los")
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=stopping)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(module, data)
    line = str(user_error(error.value))
    assert line.startswith(
        "trainer.callbacks: EarlyStopping.monitor: no metric is called val/los; there are train/loss, "
    )
    assert "val/loss, " in line
