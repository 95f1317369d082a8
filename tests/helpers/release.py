"""Steps of ``make release``: use an installed lit-clip, write checksums and notes, refuse what must not go out."""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLACEHOLDER = "example.invalid"  # RFC 2606 keeps this domain from ever existing
UNRELEASED = "not released yet"
SUMS, NOTES = "SHA256SUMS", "NOTES.md"
DATA = """
from PIL import Image
rows = ["image,caption"]
for number in range(30):
    colour = ("red", "green", "blue")[number % 3]
    Image.new("RGB", (64, 64), colour).save(f"{number}.png")
    rows.append(f"{number}.png,a {colour} square of number {number}")
open("captions.csv", "w").write("\\n".join(rows))
"""
MODEL = "runs/table/version_0/checkpoints/last.ckpt"
# The first minutes of somebody who has installed lit-clip.
FIRST_USE = (
    ("lit-clip", "--version"),
    ("python", "-c", DATA),
    ("lit-clip", "fit", "--data.train", "captions.csv", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    ("lit-clip", "classify", "0.png", "--model", MODEL, "--classes", "red", "green", "blue"),
    ("python", "-c", f"import lit_clip; print(lit_clip.load_model({MODEL!r}).similarity('0.png', ['a red square']))"),
)


def use(environment: Path) -> None:
    """Run the first commands of an environment in an empty folder; a command that fails ends the program."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    programs = environment.absolute() / "bin"
    with tempfile.TemporaryDirectory() as folder:
        for program, *words in FIRST_USE:
            shown = shlex.join([program, *(word for word in words if "\n" not in word)])
            command = [str(programs / program), *words]
            done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{shown}: failed\n{done.stdout}{done.stderr}")
            say(f"  {shown}", *(f"    {line}" for line in done.stdout.strip().splitlines()[-1:]))


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def checksums(folder: Path) -> str:
    """Return the checksums of a folder's archives, in the form that ``sha256sum --check`` reads."""
    archives = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives)


def changelog_part(changelog: str, version: str) -> tuple[str, str]:
    """Return the heading and the text of the changelog's section of a version; both empty if there is none."""
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading.split()[0] == version:
            return heading, text.strip() + "\n"
    return "", ""


def objections(project: dict[str, Any], changelog: str, tag: str) -> list[str]:
    """Return what speaks against publishing this version, under a tag if there is one."""
    version = project["version"]
    found = [
        f"project.urls.{name}: {url} is a placeholder; write the project's address in pyproject.toml"
        for name, url in project["urls"].items()
        if PLACEHOLDER in url
    ]
    heading, _ = changelog_part(changelog, version)
    if not heading:
        found.append(f"CHANGELOG.md: has no part of {version}; write it")
    elif UNRELEASED in heading:
        found.append(f"CHANGELOG.md: {version} has no date; write it in place of '{UNRELEASED}'")
    if tag and tag != f"v{version}":
        found.append(f"TAG: {tag} is not v{version}, the version of pyproject.toml")
    return found


def finish(folder: Path, tag: str) -> int:
    """Write checksums and notes beside the archives; return 1 if there is a tag and it must not be published."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (folder / SUMS).write_text(checksums(folder), encoding="utf-8")
    (folder / NOTES).write_text(changelog_part(changelog, project["version"])[1], encoding="utf-8")
    say(*(f"{path.stat().st_size:>9,} {path}" for path in sorted(folder.iterdir())))
    found = objections(project, changelog, tag)
    say(*(f"{'error' if tag else 'not to be published yet'}: {each}" for each in found))
    return int(bool(found and tag))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--use", type=Path)
    parser.add_argument("--finish", type=Path)
    parser.add_argument("--tag", default="")
    given = parser.parse_args()
    if given.use:
        use(given.use)
    if given.finish:
        sys.exit(finish(given.finish, given.tag))
