"""Inputs that were found to be read wrongly once are read right for good."""

from pathlib import Path

import pytest

from tests.fuzz.driver import SEPARATOR, Driver, read_case
from tests.fuzz.oracle import ROOT
from tests.fuzz.targets import NAMES

CORPUS = ROOT / "tests/corpus"
LARGEST = 10_000  # bytes


def cases(target: str) -> list[Path]:
    return sorted(path for path in (CORPUS / target).glob(f"*{SEPARATOR}*"))


@pytest.mark.parametrize("target", [name for name in NAMES if cases(name)])
def test_inputs_found_earlier_lead_to_no_finding(target: str) -> None:
    driver = Driver()
    driver.batch(target, 0, 60, 1, map(read_case, cases(target)))
    assert not driver.summary.found, [(found.finding, found.input.name) for found in driver.summary.found.values()]
    assert driver.summary.inputs[target] == len(cases(target))


def test_cases_are_small() -> None:
    assert all(path.stat().st_size < LARGEST for target in NAMES for path in cases(target))
