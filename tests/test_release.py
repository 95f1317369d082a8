"""What ``make release`` builds, checks and refuses, and the workflows, which call the Makefile's targets."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import release
from tests.helpers.wheels import PROJECT, build_wheel, plain_environment

WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Stands for Python in the Makefile: notes what it is called with, and makes what venv and hatchling would make.
PYTHON = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
*"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*hatchling*) mkdir -p {dist} && touch {dist}/a.tar.gz {dist}/a.whl ;;
*{fails}*) exit 1 ;;
esac
"""


def made(folder: Path, fails: str, tag: str = "") -> tuple[int, list[str]]:
    """Run ``make release`` with a Python that makes nothing; return its exit code and the calls."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    for name in ("python", "check-wheel-contents"):
        (programs / name).write_text(PYTHON.format(calls=calls, dist=folder / "dist", fails=fails))
        (programs / name).chmod(0o755)
    variables = [f"VENV={folder}", f"PYTHON={programs}/python", f"FRESH={folder}/fresh", f"DIST={folder}/dist"]
    done = subprocess.run(["make", "release", *variables, f"TAG={tag}"], cwd=ROOT, capture_output=True, check=False)
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_each_archive_is_installed_and_used_in_a_fresh_environment(tmp_path: Path) -> None:
    code, calls = made(tmp_path, "nothing", "v9")
    assert code == 0
    marks = ("-m twine", "-m venv", "--quiet", "--use")
    steps = [mark for call in calls[1:] for mark in marks if mark in call]  # the first call installs what make needs
    assert steps == ["-m twine", *(2 * ["-m venv", "--quiet", "--use"])]
    assert [call.split()[-1] for call in calls[1:] if "--quiet" in call] == [
        f"{tmp_path}/dist/a.{x}" for x in ("tar.gz", "whl")
    ]
    assert calls[-1].endswith("--tag v9")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("step", ["twine", "a.whl", "--use", "--finish"])
def test_a_release_stops_at_the_step_that_fails(tmp_path: Path, step: str) -> None:
    code, calls = made(tmp_path, step)
    assert code != 0
    assert step in calls[-1]


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b.whl", "a.tar.gz"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "SHA256SUMS").write_text(release.checksums(tmp_path))
    done = subprocess.run(
        ["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout == b"a.tar.gz: OK\nb.whl: OK\n"


def test_notes_are_the_part_of_the_changelog() -> None:
    text = "# Changelog\n\n## 0.2.0 - 2027-01-01\n\n### Added\n\n- b\n\n## 0.1.0 - 2026-12-01\n\n- a\n"
    assert release.changelog_part(text, "0.2.0") == ("0.2.0 - 2027-01-01", "### Added\n\n- b\n")
    assert release.changelog_part(text, "0.1.0") == ("0.1.0 - 2026-12-01", "- a\n")
    assert release.changelog_part(text, "0.1") == ("", "")
    ours = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "### Added" in release.changelog_part(ours, PROJECT["version"])[1]


@pytest.mark.parametrize(
    ("urls", "heading", "tag", "found"),
    [
        ("https://lit-clip.example.org", "## 1.0 - 2027-01-01", "v1.0", []),
        ("https://lit-clip.example.invalid", "## 1.0 - 2027-01-01", "v1.0", ["project.urls.Source"]),
        ("https://lit-clip.example.org", "## 1.0 - not released yet", "", ["CHANGELOG.md"]),
        ("https://lit-clip.example.org", "## 0.9 - 2026-01-01", "v0.9", ["CHANGELOG.md", "TAG"]),
    ],
)
def test_what_must_not_be_published_is_named(urls: str, heading: str, tag: str, found: list[str]) -> None:
    objections = release.objections({"version": "1.0", "urls": {"Source": urls}}, heading, tag)
    assert [text.partition(":")[0] for text in objections] == found


def test_placeholders_of_addresses_cannot_go_out(tmp_path: Path) -> None:
    """The project has no address yet; write them into pyproject.toml and this test has nothing to refuse."""
    assert PROJECT["urls"].keys() == {"Documentation", "Source", "Issues", "Changelog"}
    placeholders = [name for name, url in PROJECT["urls"].items() if release.PLACEHOLDER in url]
    refused = release.finish(tmp_path, f"v{PROJECT['version']}")
    assert refused or not placeholders
    assert release.finish(tmp_path, "") == 0  # a try


def runs(workflow: dict[str, Any]) -> list[str]:
    """Return the commands of a workflow, one for each entry of a matrix."""
    found = []
    for job in workflow["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for command in (step["run"] for step in job["steps"] if "run" in step):
            found += [re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, row=row: row[name[1]], command) for row in rows]
    return found


def test_workflows_call_targets_of_the_makefile_alone() -> None:
    commands = [command for workflow in WORKFLOWS.values() for command in runs(workflow)]
    targets = {command.split()[1] for command in commands if command.startswith("make ")}
    assert targets == {"check", "quickstart", "release", "test", "test-lowest"}
    assert all(re.search(rf"^{target}:.*##", MAKEFILE, re.MULTILINE) for target in targets)
    (other,) = (command for command in commands if not command.startswith("make "))
    assert other.startswith("gh release create ")
    assert all(f"dist/{name}" in other for name in (release.SUMS, release.NOTES))


def test_workflows_run_when_they_should_and_may_only_read() -> None:
    triggers = {name: workflow[True] for name, workflow in WORKFLOWS.items()}  # YAML 1.1 reads `on` as true
    assert {*triggers["checks.yml"]} == {"push", "pull_request"}
    kept = [step["with"].get("path") for step in WORKFLOWS["checks.yml"]["jobs"]["check"]["steps"] if "with" in step]
    assert kept[-1] == "site"  # which `make check` has built
    assert triggers["release.yml"] == {"push": {"tags": ["v*"]}}
    (weekly,) = triggers["quickstart.yml"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", weekly["cron"])
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}
        assert all(0 < job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
        assert not any("${{ github" in step.get("run", "") for step in steps), f"{name}: a name of a branch is no code"


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint")
def test_workflows_pass_actionlint() -> None:
    subprocess.run(["actionlint"], cwd=ROOT, check=True)


def test_a_package_index_shows_the_readme_with_its_pictures_and_links(tmp_path: Path) -> None:
    """It has no other file: an address is absolute, and names a file of the source by the project's own address."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="of the dev extra: make install")
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        shown = wheel.read(metadata).decode()
    pictures, links = re.findall(r'src(?:set)?="(.*?)"', shown), re.findall(r"\]\((.*?)\)", shown)
    for kind, addresses in (("raw", pictures), ("blob", links)):
        start = f"{PROJECT['urls']['Source']}/{kind}/HEAD/"
        ours = [each.partition("#")[0].removeprefix(start) for each in addresses if each.startswith(start)]
        assert len(ours) >= 4
        assert all((ROOT / path).exists() for path in ours)
        assert all(re.match("https://|#", each) for each in addresses)
    assert len(pictures) == 4


@pytest.mark.slow
def test_the_first_commands_of_a_user_work_beside_the_wheel(tmp_path: Path) -> None:
    plain_environment(tmp_path / "env", build_wheel(tmp_path))
    release.use(tmp_path / "env")
