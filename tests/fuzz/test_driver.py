"""The fuzzing command finds what it should, keeps it, and can show it again."""

import json
import os
from pathlib import Path

import pytest

from tests.fuzz.driver import Driver, read_case, seed_of
from tests.fuzz.inputs import Input, edited, to_json
from tests.fuzz.oracle import ROOT
from tests.fuzz.targets import NAMES, demo, evaluation, indexes, pairs, remote, segmentation, shards, weights
from tests.fuzz.test_corpus import cases
from tests.helpers import forks
from tests.helpers.demo import skip_without_starlette

pytestmark = pytest.mark.slow  # what the fuzzer has found is in test_corpus.py

PLANTED = "tests/fuzz/planted.py"
FOUND = {
    "canary": "import",
    "process": "subprocess.Popen",
    "shell": "os.system",
    "network": "socket.getaddrinfo",
    "elsewhere": "file elsewhere",
    "memory": "memory",
    "bug": "KeyError",
    "wrong": "AssertionError",
    "lines": "message of several lines",
    "long": "message longer than 500 characters",
    "escape": "control character in a message",
    "nameless": "message names no file",
    "flood": "flood of warnings",
    "hang": "hang",
    "segfault": "killed by SIGSEGV",
}

WHOLE = {
    "classes": pairs.class_trees,
    "checkpoints": weights.checkpoint_trees,
    "sharded_checkpoints": lambda: {shards.INDEX: json.loads(shards.whole_shards()[shards.INDEX])},
    "approximate": lambda: {indexes.FACTS: json.loads(indexes.whole_index()[indexes.FACTS])},
    "decisions": lambda: {"t.json": [[["every pair of", [[[0, 0], "keep"], [[1, 1], "drop"]]], 3]]},
    "masks": lambda: {"mask.json": {"mode": "I;16", "pixels": [0, 2, 255], **segmentation.SETTINGS}},
    "boxes": lambda: {"coco.json": segmentation.COCO},
    "suites": evaluation.suite_trees,
    "results": evaluation.result_trees,
    "hub": remote.hub_trees,
}


@pytest.mark.parametrize(
    "name", [name if name != "hang" else pytest.param(name, marks=pytest.mark.slow) for name in FOUND]
)
def test_what_no_input_may_lead_to_is_found(name: str, tmp_path: Path) -> None:
    """Also kept with its story, as small as it can be, and found again when it is replayed."""
    driver = Driver(tmp_path, limit=1 if name == "hang" else 20, memory=2**27)
    driver.batch(f"{PLANTED}:{name}", seed=1, seconds=60, count=10)
    (found,) = driver.summary.found.values()
    assert found.finding.kind == FOUND[name]
    (case,) = tmp_path.rglob("*--a.txt")
    assert b"!" in case.read_bytes()
    if name not in ("hang", "segfault", "memory", "flood"):  # too slow to be made smaller, or shown once only
        assert case.read_bytes() == b"!"
    (story,) = tmp_path.rglob("*.story")
    assert json.loads(story.read_text())["kind"] == FOUND[name]
    if name in ("bug", "segfault"):
        again = Driver()
        again.batch(f"{PLANTED}:{name}", 0, 30, 1, [read_case(case)])
        assert [each.finding.kind for each in again.summary.found.values()] == [FOUND[name]]


def test_what_a_hub_may_not_do_is_found_without_the_checks() -> None:
    driver = Driver()
    driver.batch(f"{PLANTED}:hub_tag", seed=1, seconds=60, count=1)
    assert [found.finding.kind for found in driver.summary.found.values()] == ["AssertionError"]


def test_error_while_an_input_is_made_is_shown_as_the_fuzzers_own() -> None:
    driver = Driver()
    driver.batch(f"{PLANTED}:unmade", seed=1, seconds=30, count=5)
    (found,) = driver.summary.found.values()
    assert found.finding.kind == "exit with 1"
    assert found.finding.traceback.splitlines()[-1] == "KeyError: 'a'"


def test_values_that_were_put_into_a_tree_are_not_changed_by_later_edits() -> None:
    value = {"a": 1}
    whole, first = 1, 3  # places
    assert edited([], [("replace", whole, value), ("replace", first, "x")]) == {"a": "x"}
    assert value == {"a": 1}


def test_refusal_that_names_the_file_is_no_finding() -> None:
    driver = Driver()
    driver.batch(f"{PLANTED}:harmless", seed=1, seconds=30, count=20)
    assert not driver.summary.found
    (outcomes,) = driver.summary.outcomes.values()
    assert outcomes["refused"] > 0
    assert sum(driver.summary.inputs.values()) == sum(outcomes.values()) == 20


def test_same_seed_makes_the_same_inputs(tmp_path: Path) -> None:
    stories = []
    for number in range(2):
        driver = Driver(tmp_path / str(number))
        driver.batch(f"{PLANTED}:bug", seed=7, seconds=30, count=25)
        stories.append((driver.summary.outcomes, [found.times for found in driver.summary.found.values()]))
    assert stories[0] == stories[1]


def test_command_ends_with_1_after_a_finding_and_says_what_to_do(tmp_path: Path) -> None:
    words = [str(ROOT / "tests/fuzz/__main__.py"), "--minutes", "0.02", "--target", f"{PLANTED}:always"]
    program = forks.Program(forks.script, [*words, "--out", str(tmp_path)], ROOT, {**os.environ})
    (done,) = forks.run([program], timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "KeyError" in done.stdout
    assert "copy its input to tests/corpus/" in done.stdout


def test_a_demo_that_gives_files_away_is_found() -> None:
    skip_without_starlette()
    form, inputs = demo.requests()["forms"][0], []
    for path in ("@folder@/secret.txt", "@folder@/a.png/../../work/secret.txt", "/proc/self/environ"):
        fields = {**form["fields"], "names": f"{path}\na"}
        inputs.append(Input("forms", to_json([{**form, "fields": fields}])))
    for target, times in (("tests/fuzz/targets/demo.py:leaky", 3), ("demo", 0)):
        driver = Driver()
        driver.batch(target, 0, 60, 1, inputs)
        assert sum(driver.summary.inputs.values()) == 3
        found = driver.summary.found.values()
        assert all(each.finding.kind == "AssertionError" for each in found)
        assert sum(each.times for each in found) == times


# Most targets also read what was found earlier: test_corpus.py.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if cases(name) else name for name in NAMES]
)
def test_every_target_reads_its_inputs(name: str) -> None:
    """What is found is for ``make fuzz``: with another version of hypothesis a seed makes other inputs."""
    driver = Driver()
    driver.batch(name, seed_of(0, name, 0), seconds=60, count=3)
    assert sum(driver.summary.outcomes[name].values()) > 0
    assert not [found for found in driver.summary.found.values() if found.finding.kind.startswith("exit")]


@pytest.mark.parametrize("name", WHOLE)
def test_what_hostile_files_are_made_from_is_used(name: str) -> None:
    """Otherwise all of them are refused for the same reason, and nothing behind it is tried."""
    driver = Driver()
    driver.batch(name, 0, 60, 1, [Input(file, to_json(tree)) for file, tree in WHOLE[name]().items()])
    outcomes = driver.summary.outcomes[name]
    assert not driver.summary.found
    assert outcomes["used"] >= driver.summary.inputs[name] > 0
    assert outcomes["refused"] == 0
