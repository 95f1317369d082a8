"""Commands without a configuration: their command lines, ``classify`` and ``models``."""

import csv
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import lit_clip.commands.class_sources
import lit_clip.models.flops
from lit_clip import list_models, load_model
from lit_clip.cli.plain_help import COMMON
from lit_clip.cli.subcommands import COMMANDS, command_parser, run_command
from lit_clip.commands.class_sources import class_probabilities
from lit_clip.commands.classify import classify, read_classes
from lit_clip.commands.evaluate import evaluate
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.models.flops import measure
from lit_clip.models.registry import resolve_architecture
from lit_clip.weights.load import create_model
from tests.conftest import lit_clip_command
from tests.helpers import forks

NAMES = ["tiger", "pizza", "bicycle"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def example(
    words: list[str], single: str, *, model: str, flag: bool = False, several: list[str] | None = None, number: int = 3
) -> None:
    """Do nothing."""


def test_a_functions_signature_defines_its_command_line() -> None:
    def parse(*options: str) -> dict[str, object]:
        return vars(command_parser("example", example).parse_args(list(options)))

    assert parse("one", "two", "three", "--model", "m") == {
        **{"words": ["two", "three"], "single": "one", "model": "m", "flag": False, "several": None, "number": 3}
    }
    parsed = parse("one", "--model", "m", "--flag", "--several", "a", "b", "--number", "4")
    assert (parsed["words"], parsed["flag"], parsed["several"], parsed["number"]) == ([], True, ["a", "b"], 4)


@dataclass(frozen=True)
class Group:
    """Options that belong together.

    Args:
        size: of something.
        words: several.
        quick: whether to hurry.
    """

    flat: ClassVar[bool] = True
    size: int = 3
    words: list[str] | None = None
    quick: bool = False


def grouped(name: str, *, group: Group, number: int = 1) -> None:
    """Do nothing.

    Args:
        name: of something.
        group: options.
        number: of something.
    """
    received.append((name, group, number))


received: list[object] = []


def test_a_list_that_is_typed_in_parts_is_put_together_and_replaces_its_default() -> None:
    typed = ["--classes", "a", "b", "--templates", "a {}", "--classes", "c", "--output", "csv", "--output", "json"]
    parsed = command_parser("classify", classify).parse_args(["photos", "--model", "m", *typed])
    assert (parsed.classes, parsed.templates, parsed.output) == (["a", "b", "c"], ["a {}"], "json")
    twice = ["--suite", "s.yaml", "--model", "m", "--output", "o", "--shots", "1", "--shots", "2", "4"]
    assert command_parser("evaluate", evaluate).parse_args(twice).shots == [1, 2, 4]


def test_the_fields_of_a_dataclass_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "grouped", f"{__name__}:grouped")
    monkeypatch.setattr(sys.modules[__name__], "received", [])
    run_command(["grouped", "a", "--size", "5", "--words", "b", "c", "--quick"])
    run_command(["grouped", "a", "--number", "2"])
    assert received == [("a", Group(5, ["b", "c"], True), 1), ("a", Group(), 2)]
    helps = {action.dest: action.help for action in command_parser("grouped", grouped)._actions}
    assert [helps[name] for name in ("size", "words", "quick")][1:] == ["several.", "whether to hurry."]
    assert str(helps["size"]).startswith("of something.")
    with pytest.raises(InputError, match="group"):
        run_command(["grouped", "a", "--group", "b"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_every_parameter(name: str) -> None:
    module, _, function = COMMANDS[name].partition(":")
    parser = command_parser(name, getattr(importlib.import_module(module), function))
    assert parser.description
    options = [action for action in parser._actions if action.dest != "help"]
    assert options
    assert all(action.help and not action.help.startswith(" (") for action in options)


def test_the_help_names_the_commands(in_process: Run) -> None:
    helped, bare = in_process("--help"), in_process()
    assert all(name in helped.stdout for name in COMMANDS)
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", helped.stdout)


# classify


def classified(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    run_command(["classify", *words, "--num_workers", "0"])
    return capsys.readouterr().out


def test_classify_recognises_the_drawings_that_the_model_was_trained_on(
    drawings: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder, names = drawings
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    options = ["--classes", str(tmp_path / "classes.txt"), "--templates", "{}", "--output", "json", "--top_k", "1"]
    rows = json.loads(classified(str(folder), "--model", str(checkpoint), *options, capsys=capsys))
    assert len(rows) == 64
    correct = sum(Path(row["image"]).stem == row["classes"][0]["class"].replace("/", "_") for row in rows)
    assert correct >= 60


def test_probabilities_are_the_softmax_of_scaled_cosines(
    drawings: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder, _ = drawings
    images = [folder / f"{name}.png" for name in NAMES]
    templates = ["a {}", "{}!"]
    options = ["--classes", *NAMES, "--templates", *templates, "--output", "json", "--batch_size", "2"]
    rows = json.loads(classified(*map(str, images), "--model", str(checkpoint), *options, capsys=capsys))
    model = load_model(checkpoint)
    with torch.no_grad():
        columns = []
        for name in NAMES:
            texts = [model.encode_text(model.tokenize(template.replace("{}", name)))[0] for template in templates]
            mean = sum(text / text.norm() for text in texts)
            assert isinstance(mean, torch.Tensor)
            columns.append(mean / mean.norm())
        for row in rows:
            image = model.encode_image(model.preprocess(Image.open(row["image"]))[None])[0]
            logits = [float(model.logit_scale.exp() * (image / image.norm()) @ column) for column in columns]
            expected = np.exp(logits) / np.exp(logits).sum()
            result = {prediction["class"]: prediction["probability"] for prediction in row["classes"]}
            assert np.allclose([result[name] for name in NAMES], expected, atol=2e-5)
            assert [prediction["probability"] for prediction in row["classes"]] == sorted(result.values(), reverse=True)


def test_with_a_logit_bias_each_probability_is_a_sigmoid() -> None:
    features, classifier = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    model = SimpleNamespace(logit_scale=torch.tensor(2.0).log(), logit_bias=torch.tensor(-1.0))
    result = class_probabilities(model, features, classifier)  # pyright: ignore[reportArgumentType]
    expected = [[1 / (1 + np.exp(1 - 2)), 1 / (1 + np.exp(1))], [1 / (1 + np.exp(1)), 0.5]]
    assert np.allclose(result, expected, atol=1e-6)


def test_standard_output_is_csv_only_and_progress_goes_to_standard_error(
    drawings: tuple[Path, Path, list[str]],
) -> None:
    checkpoint, folder, _ = drawings
    options = ["--model", str(checkpoint), "--classes", *NAMES, "--templates", "{}", "--output", "csv", "--top_k", "2"]
    result: subprocess.CompletedProcess[str] = lit_clip_command(
        folder,
        *("classify", "tiger.png", "pizza.png", *options, "--batch_size", "1"),
        function=forks.command_with_progress,
    )
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["image"], row["rank"]) for row in rows] == [
        *(("pizza.png", "1"), ("pizza.png", "2"), ("tiger.png", "1"), ("tiger.png", "2"))
    ]
    assert (rows[0]["class"], rows[2]["class"]) == ("pizza", "tiger")
    assert re.search(r"images: 1 of 2, .*left$", result.stderr, re.MULTILINE)


def test_an_output_file_holds_what_is_otherwise_printed(
    drawings: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder, _ = drawings
    for output in ("csv", "json", "table"):
        options = ["--model", str(checkpoint), "--classes", *NAMES, "--output", output]
        printed = classified(str(folder / "tiger.png"), *options, capsys=capsys)
        path = tmp_path / f"result.{output}"
        assert classified(str(folder / "tiger.png"), *options, "--output_file", str(path), capsys=capsys) == ""
        text = path.read_text(encoding="utf-8")
        assert text == printed or (output == "table" and "tiger" in text)


def test_classes_may_be_words_a_comma_separated_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("tiger\n\n  ice  cream \n", encoding="utf-8")
    assert read_classes([str(tmp_path / "classes.txt")]) == ["tiger", "ice cream"]
    assert read_classes(["tiger", "ice cream"]) == ["tiger", "ice cream"]
    assert read_classes(["tiger, ice cream"]) == ["tiger", "ice cream"]
    assert read_classes(["scissors, open", "tiger"]) == ["scissors, open", "tiger"]
    names = [f"class number {i}" for i in range(100)]  # longer than a file name may be
    assert read_classes([", ".join(names)]) == names


def test_a_byte_order_mark_is_not_part_of_a_class_name(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbftiger\r\npizza\r\n")
    assert read_classes([str(path)]) == ["tiger", "pizza"]
    path.write_bytes(b"\xef\xbb\xbftiger\r\npizza\r\ntiger\r\n")
    with pytest.raises(InputError, match="named more than once: 'tiger'"):
        read_classes([str(path)])


@pytest.mark.parametrize("output", ["table", "csv", "json"])
def test_a_file_name_that_is_not_unicode_is_unchanged_in_results_and_escaped_in_the_table(
    output: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system only allows Unicode names")
    words = ["classify", name, "--model", str(tiny_checkpoint), "--classes", "a", "b", "--output", output]
    result = lit_clip_command(tmp_path, *words, "--num_workers", "0")
    assert result.returncode == 0, result.stderr
    if output == "json":
        assert json.loads(result.stdout.encode())[0]["image"] == name
    else:
        shown = b"caf\\xe9.png" if output == "table" else b"caf\xe9.png"
        assert shown in result.stdout.encode(errors="surrogateescape")


def test_classes_given_twice_are_listed(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("tiger\npizza\nTiger\npizza\nbicycle\n", encoding="utf-8")
    refused = in_process("classify", "x.png", "--model", "last.ckpt", "--classes", "classes.txt")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "'Tiger', 'pizza'" in refused.stderr
    assert "bicycle" not in refused.stderr
    refused = in_process("classify", "x.png", "--model", "last.ckpt", "--classes", "a", "b", "a")
    assert "named more than once: 'a';" in refused.stderr


def test_classify_refuses_unusable_input_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "empty/deep").mkdir(parents=True)
    (tmp_path / "empty/notes.txt").write_text("not an image")
    (tmp_path / "empty/.hidden.png").write_text("not an image")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")

    def run(*words: str) -> None:
        run_command(["classify", *words, "--model", str(tiny_checkpoint), "--num_workers", "0"])

    with pytest.raises(InputError, match=r"empty: no images in this folder or below"):
        run(str(tmp_path / "empty"), "--classes", "a", "b")
    with pytest.raises(InputError, match=r"absent.png: no such file"):
        run(str(tmp_path / "absent.png"), "--classes", "a", "b")
    with pytest.raises(InputError, match=r"broken.png: cannot read this image"):
        run(str(tmp_path / "good.png"), str(tmp_path / "broken.png"), "--classes", "a", "b")
    with pytest.raises(InputError, match=r"none of 1 images could be read; the first: .*broken.png"):
        run(str(tmp_path / "broken.png"), "--classes", "a", "b", "--on_error", "skip")
    with pytest.raises(InputError, match=r"'a photo' has no {}"):
        run(str(tmp_path / "good.png"), "--classes", "a", "b", "--templates", "a photo")
    with pytest.raises(InputError, match=r"--classes: .*absent.txt: there is no such file"):
        run(str(tmp_path / "good.png"), "--classes", str(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match="no images"):
        run("--classes", "a", "b")


def test_a_skipped_image_is_left_out_and_reported(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("junk")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    options = ["--classes", "a", "b", "--output", "csv", "--top_k", "1", "--on_error", "skip", "--num_workers", "0"]
    run_command(["classify", str(tmp_path), "--model", str(tiny_checkpoint), *options])
    output = capsys.readouterr()
    assert [row["image"] for row in csv.DictReader(io.StringIO(output.out))] == [str(tmp_path / "good.png")]
    assert f"skipped: {tmp_path / 'broken.png'}" in output.err.replace("\n", " ")


@pytest.mark.parametrize("to_file", [False, True])
def test_ctrl_c_keeps_the_finished_rows(
    in_process: Run, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, to_file: bool
) -> None:
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    calls = iter([False, False, True])

    def interrupted_in_the_third_batch(*arguments: torch.Tensor) -> torch.Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return class_probabilities(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(lit_clip.commands.class_sources, "class_probabilities", interrupted_in_the_third_batch)
    options = ["--model", str(tiny_checkpoint), "--classes", "a", "b", "--output", "csv", "--top_k", "1"]
    options += ["--batch_size", "2", "--num_workers", "0"] + (["--output_file", "rows.csv"] if to_file else [])
    stopped = in_process("classify", str(tmp_path), *options)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1].startswith("lit-clip: interrupted: 4 of 5 are in ")
    assert not (tmp_path / "rows.csv").exists()
    text = (tmp_path / "rows.csv.partial").read_text() if to_file else stopped.stdout
    assert [Path(row["image"]).name for row in csv.DictReader(io.StringIO(text))] == [f"{i}.png" for i in range(4)]


# models


def test_measured_sizes_of_the_papers_model_are_the_papers() -> None:
    size = measure(resolve_architecture("ViT-B-32"))
    assert (size.image_parameters, size.text_parameters, size.parameters) == (87_849_216, 63_428_096, 151_277_313)
    assert (size.image_size, size.context_length, size.embed_dim) == ("224", 77, 512)
    assert size.image_flops == pytest.approx(8.82e9, abs=0.005e9)
    assert size.text_flops == pytest.approx(5.96e9, abs=0.005e9)


def test_parameter_counts_equal_those_of_the_created_model(tiny_config: CLIPConfig) -> None:
    model = create_model(tiny_config)
    size = measure(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.image_parameters == sum(parameter.numel() for parameter in model.visual.parameters())


def test_the_table_lists_the_matching_models(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["models", "b-32-q", "TINY"])
    output = capsys.readouterr().out
    listed = [name for name in list_models() if f" {name} " in output]
    assert listed == [name for name in list_models() if "b-32-q" in name.lower() or "tiny" in name]
    assert "8.82" in output


def test_a_model_that_cannot_be_measured_gets_a_question_mark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: CLIPConfig) -> None:
        raise NotImplementedError("not on meta")

    monkeypatch.setattr(lit_clip.models.flops, "CLIP", fail)
    run_command(["models", "ViT-tiny-16-64"])
    assert capsys.readouterr().out.split("ViT-tiny-16-64")[1].split()[:3] == ["?", "?", "?"]


def test_pretrained_lists_open_clips_registry(capsys: pytest.CaptureFixture[str]) -> None:
    import open_clip

    run_command(["models", "ViT-B-32", "--pretrained"])
    expected = [f"{model}:{tag}" for model, tag in open_clip.list_pretrained() if "ViT-B-32" in f"{model}:{tag}"]
    assert "ViT-B-32:laion2b_s34b_b79k" in expected
    assert capsys.readouterr().out.splitlines() == expected
    with pytest.raises(InputError, match="no weights named nothing-like-it"):
        run_command(["models", "nothing-like-it", "--pretrained"])


def test_a_single_class_is_refused(drawings: tuple[Path, Path, list[str]]) -> None:
    checkpoint, folder, _ = drawings
    with pytest.raises(InputError, match="--classes tiger: a single class gets 100 % of every image"):
        classify([str(folder)], model=str(checkpoint), classes=["tiger"])


def test_the_common_options_of_fit_exist(in_process: Run, caption_table: Path, tmp_path: Path) -> None:
    values = {"--config": "run.yaml", "--recipe": "null", "--print_plan": "", "--ckpt_path": "null"}
    values |= {"--data.train": str(caption_table), "--data.val": str(caption_table), "--data.keep": "null"}
    values |= {"--model.freeze": "{image: all}", "--model.lora": "null"}
    values |= {"--model.architecture": "RN-tiny-64", "--model.loss": "lit_clip.losses.Contrastive"}
    values |= {"--trainer.max_time": "00:01:00:00", "--trainer.strategy": "auto", "--trainer.precision": "32-true"}
    values |= {"--model.optimizer.lr": "1e-3"}
    (tmp_path / "run.yaml").write_text("data: {class_path: datamodules.Captions}\n", encoding="utf-8")
    options = [name for section in COMMON.values() for name in section if name != "--model.pretrained"]
    words = [f"{name}={values.get(name, 1)}" if name != "--print_plan" else name for name in options]
    done = in_process("fit", *words, "--trainer.accelerator", "cpu")
    assert done.returncode == 0, done.stderr


def test_the_complete_text_of_an_option_a_section_and_a_class_is_one_word_away(in_process: Run) -> None:
    def help_of(*words: str) -> str:
        return in_process("fit", *words, environment={"COLUMNS": "80"}).stdout

    assert "..." not in "".join(line for line in help_of("--help").splitlines() if "trainer" not in line)  # cut off
    text = help_of("--help", "all")
    assert all(option in text for name in ("start", "trainer") for option in COMMON[name])
    assert re.search(r"``|:\w+:`", text) is None
    complete = {part: help_of(f"--{part}.help") for part in ("trainer", "model", "ckpt_path")}
    assert "'transformer-engine-float16'" in complete["trainer"]  # types, defaults and all sentences
    assert "--model.micro_batch_size" in complete["model"]
    assert "registry" in complete["ckpt_path"]
    assert len(complete["trainer"].splitlines()) > 200
    one = help_of("--trainer.precision.help")
    assert "'transformer-engine-float16'" in one
    assert "accelerator" not in one
    assert ".decay" in help_of("--trainer.callbacks.help", "callbacks.EMA")
    text = help_of("--data.help", "datamodules.Captions")
    assert "--data.captions CAPTIONS" in text
    assert "Only needed by fit." in " ".join(text.split())
    assert re.search(r"``|:\w+:`", text) is None
