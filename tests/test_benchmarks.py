"""The benchmarks' result files, the table and the check of ratios; nothing is timed here."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor

from lit_clip.cli import lightning
from lit_clip.evaluation.data import LabelledImages
from lit_clip.models.config import Preprocessing
from tests.conftest import ROOT
from tests.helpers import forks

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
STEP: dict[str, Any] = {
    "name": "train_step/ViT-B-32/fp32",
    "title": "training step, ViT-B-32, batch 32, fp32",
    "peer": "open_clip 3.3.0",
    "peers": 10.4,
    "ours": 5.5,
    "unit": "s",
    "ratio": {"median": 1.89, "least": 1.8, "greatest": 2.0, "pairs": 5},
    "figures": {"peers_share_of_peak": 0.801, "our_share_of_peak": 0.856, "mean_tokens": 14.03},
    "command": "python benchmarks/train_step.py",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "machine": {"cpu": "AMD EPYC", "instructions": "AVX512", "cores": 2, "threads": 2},
}
LOSSES = {**STEP, "name": "losses/ViT-B-32", "title": "losses of 20 steps", "ratio": None, "peers": None, "ours": None}
LOSSES["figures"] = {"largest_difference": 3e-6}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Folder with results as `make bench` writes them."""
    (tmp_path / "a.json").write_text(json.dumps([STEP]), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([LOSSES]), encoding="utf-8")
    return tmp_path


def run(script: str, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check(folder: Path, expected: dict[str, Any], *words: str) -> "subprocess.CompletedProcess[str]":
    file = folder / "expected.yaml"
    file.write_text(yaml.safe_dump(expected, sort_keys=False), encoding="utf-8")
    return run("check_ratios.py", folder, "--against", file, *words)


def functions(script: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / script))


def test_the_table_has_a_row_per_comparison_and_names_the_machine(measured: Path) -> None:
    done = run("report.py", measured)
    assert done.stdout.splitlines() == [
        "Measured on 2 cores of AMD EPYC (AVX512), 2 threads, with python 3.11.7, torch 2.13.0.",
        "",
        "| work | peer | lit-clip | times better | of the peak: peer, lit-clip | command |",
        "|---|--:|--:|--:|--:|---|",
        "| training step, ViT-B-32, batch 32, fp32 | open_clip 3.3.0: 10.40 s | 5.50 s | 1.89 (1.80 to 2.00, 5 pairs) "
        "| 80.1%, 85.6% | `python benchmarks/train_step.py` |",
        "",
        "- training step, ViT-B-32, batch 32, fp32: mean tokens 14.03",
        "- losses of 20 steps: largest difference 3e-06 (`python benchmarks/train_step.py`)",
    ]


def test_each_machine_has_its_own_table(measured: Path) -> None:
    gpu = {**STEP, "title": "on a GPU", "machine": {**STEP["machine"], "gpu": "NVIDIA H100"}}
    (measured / "c.json").write_text(json.dumps([gpu]), encoding="utf-8")
    first, second = run("report.py", measured).stdout.split("Measured on ")[1:]
    assert "ViT-B-32" in first
    assert "on a GPU" not in first
    assert second.startswith("2 cores of AMD EPYC (AVX512) and one NVIDIA H100, 2 threads")
    assert "| on a GPU |" in second


def test_ratios_within_their_bounds_pass(measured: Path) -> None:
    expected = {STEP["name"]: {"least": {"ratio": 1.8}}, "losses/ViT-B-32": {"most": {"largest_difference": 1e-4}}}
    done = check(measured, expected, "--all")
    assert (done.returncode, done.stdout) == (0, "0 figures out of bounds, 2 results checked\n")


def test_each_figure_out_of_bounds_is_a_line_and_the_exit_code_is_1(measured: Path) -> None:
    expected = {
        STEP["name"]: {"least": {"ratio": 1.9, "our_share_of_peak": 0.85, "peers_share_of_peak": 0.9}},
        "losses/ViT-B-32": {"most": {"largest_difference": 1e-6}},
    }
    done = check(measured, expected)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "train_step/ViT-B-32/fp32: ratio 1.89 is below 1.9, pairs 1.89 (1.80 to 2.00, 5 pairs)",
        "train_step/ViT-B-32/fp32: peers_share_of_peak 0.801 is below 0.9",
        "losses/ViT-B-32: largest_difference 3e-06 is above 1e-06",
        "3 figures out of bounds, 2 results checked",
    ]


def test_a_missing_result_fails_only_with_all(measured: Path) -> None:
    expected = {"text_encoding": {"least": {"ratio": 5.0}}}
    assert check(measured, expected).returncode == 0
    done = check(measured, expected, "--all")
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "text_encoding: not measured")


def test_a_missing_or_nan_figure_is_out_of_bounds(measured: Path) -> None:
    nan = {**STEP, "name": "nan", "figures": {"share": float("nan")}}
    (measured / "c.json").write_text(json.dumps([nan]), encoding="utf-8")
    done = check(measured, {"losses/ViT-B-32": {"least": {"ratio": 1.0}}, "nan": {"least": {"share": 0.1}}})
    assert done.stdout.splitlines()[:2] == ["losses/ViT-B-32: ratio was not measured", "nan: share nan is below 0.1"]


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": {"lesat": {"ratio": 1.0}}}, "a must have least or most, and figures in them"),
        ({"a": {"most": {"difference": "1e-4"}}}, "a: difference must be a number, it is '1e-4'"),
    ],
)
def test_a_mistake_in_the_expected_ratios_is_reported(measured: Path, expected: dict[str, Any], message: str) -> None:
    done = check(measured, expected)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{measured / 'expected.yaml'}: {message}"


@pytest.mark.parametrize("content", ["{", '[{"title": "of something else"}]', "3"])
def test_a_file_not_written_by_a_benchmark_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content, encoding="utf-8")
    done = run("report.py", file)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{file}: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_ratio_is_the_median_of_ratios_not_the_ratio_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = functions("results.py", monkeypatch)["compared"]
    times = [(2.0, 1.0), (30.0, 10.0), (4.0, 1.0)]  # ratios 2, 3, 4; medians 4 and 1
    result = compared("a", "b", times)
    assert (result.peers, result.ours) == (4.0, 1.0)
    assert (result.ratio.median, result.ratio.least, result.ratio.greatest, result.ratio.pairs) == (3.0, 2.0, 4.0, 3)
    assert compared("a", "b", times, "images/s", more_is_better=True).ratio.median == pytest.approx(1 / 3)


def test_saved_results_are_loaded_with_the_command_that_reproduces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = functions("results.py", monkeypatch)
    file = tmp_path / "bench" / "a.json"
    monkeypatch.setattr(sys, "argv", ["/here/benchmarks/some.py", "--pairs", "1", "--json", str(file), "--bf16"])
    results["save"](str(file), results["compared"]("a", "b", [(2.0, 1.0)], figures={"share": 0.5}))
    (read,) = results["load"]([str(file)])
    assert read.command == "python benchmarks/some.py --pairs 1 --bf16"
    assert (read.value("ratio"), read.value("share"), read.value("other")) == (2.0, 0.5, None)
    assert read.versions["torch"] == version("torch")
    assert read.machine["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_the_memory_of_the_papers_runs_is_counted_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/evidence/scaling.md counts independently: 21 w numbers per token of a block with QuickGELU."""
    scaling = functions("scaling.py", monkeypatch)
    kept = scaling["kept_by_a_pair"]("ViT-B-32", half=False)
    tokens = 12 * 768 * 50 + 12 * 512 * 77  # blocks, width and tokens of the image and of a caption of full length
    assert kept.plain == pytest.approx(4 * 21 * tokens, rel=0.15)  # of the last blocks only one token
    assert kept.checkpointed == pytest.approx(4 * tokens, rel=0.25)
    scaling["h100"].__globals__["MODELS"] = {"ViT-B-32": (1024, False)}
    *_, memory = scaling["h100"](0.2).columns
    eight, sixty_four, many = map(float, memory.cells)
    assert 80 > eight > sixty_four > many > 20 * 151e6 / 2**30  # weights, gradients, moments and buckets


@pytest.mark.parametrize("instructions", [True, False, None])
def test_bfloat16_is_not_measured_where_it_would_be_emulated(
    instructions: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lightning, "computes_in_bfloat16", lambda accelerator: instructions)
    end_if_emulated = functions("peers.py", monkeypatch)["end_if_emulated"]
    end_if_emulated(False, "cpu")
    if instructions is False:
        with pytest.raises(SystemExit) as end:
            end_if_emulated(True, "cpu")
        assert end.value.code is None  # exit code 0, so that make continues with the next benchmark
        assert capsys.readouterr().out.startswith("not measured: ")
    else:
        end_if_emulated(True, "cpu")


def test_the_processors_name_is_read_from_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A Processor\nmodel name\t: A Processor\n", encoding="utf-8")
    cpu_model = functions("results.py", monkeypatch)["cpu_model"]
    assert cpu_model(str(file)) == "A Processor"
    assert cpu_model(str(tmp_path / "none"))


def test_make_bench_measures_every_expected_ratio() -> None:
    expected = yaml.safe_load((BENCHMARKS / "expected_ratios.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = {name.partition("/")[0].replace("losses", "train_step") for name in expected}
    assert {script for script in scripts if f"$(call measure,{script}" not in makefile} == set()


def test_programs_are_read_paused_resumed_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    running = functions("running.py", monkeypatch)
    loop = "import time\nfor i in range(10**6): print('line', i, '.', flush=True); time.sleep(0.001)"
    with running["Program"]([sys.executable, "-c", loop]) as program:
        program.wait_for(r"^line 3 \.")
        program.pause()
        status = Path(f"/proc/{program.process.pid}/stat")
        for _ in range(1000):
            if status.read_text().rpartition(")")[2].split()[0] == "T":  # stopped, see proc(5)
                break
            time.sleep(0.01)
        else:
            pytest.fail("the program is not paused")
        program.resume()
        program.wait_for(r"^line 40 \.")
    assert program.process.returncode == -9
    with (
        pytest.raises(RuntimeError, match=r"never printed 'more':\nall"),
        running["Program"](["echo", "all"]) as program,
    ):
        program.wait_for("more")


def test_flops_are_counted_where_torch_would_use_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = functions("peers.py", monkeypatch)["counted"]
    B, L, W = 3, 5, 8
    attention, x = torch.nn.MultiheadAttention(W, 2, batch_first=True).eval(), torch.randn(B, L, W)
    projections, products = 2 * B * L * W * 4 * W, 2 * 2 * B * L * L * W  # queries, keys, values, out; scores, sums

    @torch.inference_mode()
    def infer() -> object:
        return attention(x, x, x, need_weights=False)

    assert counted(infer) == projections + products
    assert torch.backends.mha.get_fastpath_enabled()
    linear = torch.nn.Linear(W, 2 * W)
    rows = torch.randn(B, W, requires_grad=True)
    assert counted(lambda: linear(rows).sum().backward()) == 3 * 2 * B * W * 2 * W  # forward, input's, weight's


def test_both_libraries_get_the_same_tiny_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = functions("peers.py", monkeypatch)
    try:
        theirs, ours = peers["open_clip_pair"]("ViT-tiny-8-64")
    finally:
        logging.disable(logging.NOTSET)
    assert theirs.state_dict().keys() - {"attn_mask"} == ours.state_dict().keys()
    images, tokens = torch.randn(2, 3, 64, 64), ours.tokenize(peers["captions"](2))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [32, 64, 128])
def test_captions_have_14_tokens_on_average(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = functions("peers.py", monkeypatch)["captions"](count)
    assert len(captions) == count
    tokenizer = SimpleTokenizer()
    lengths = [1 + len(tokenizer.encode(text)) + 1 for text in captions]  # start and end of text
    assert sum(lengths) / count == pytest.approx(14, abs=0.6)


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Lines and output of `benchmarks/on_a_gpu.py`, tried without a GPU."""
    file = tmp_path_factory.mktemp("on_a_gpu") / "runs" / "on_a_gpu.jsonl"
    words = [str(BENCHMARKS / "on_a_gpu.py"), "--device", "cpu", "--tiny", "--out", str(file)]
    (done,) = forks.run([forks.Program(forks.script, words, file.parents[1], {**os.environ})], timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], done.stdout


@pytest.mark.slow
def test_every_part_for_a_gpu_runs_to_its_end(on_a_gpu: tuple[list[dict[str, Any]], str]) -> None:
    rows, output = on_a_gpu
    assert [row for row in rows if "failed" in row] == []
    parts = ["machine", "correctness", "steps", "kernels", "profile", "feeding", "ranks"]
    assert [row["part"] for row in rows if "end" in row] == parts
    assert {row["skipped"] for row in rows if "skipped" in row} == {"needs CUDA"}
    compiled = {"open_clip compiled", "lit-clip compiled", "lit-clip compiled, Trainer"}
    assert {row["side"] for row in rows if row.get("model") == "ViT-B-32"} >= {"open_clip", "lit-clip"} | compiled
    assert len([line for line in output.splitlines() if line.startswith("│ ViT-B-32 ") and "(" in line]) == 1
    table = output.partition("largest gaps")[2]
    assert len([line for line in table.splitlines() if line.startswith("│")]) == 5


def test_what_fails_on_a_gpu_does_not_end_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = functions("on_a_gpu.py", monkeypatch)

    class Part:
        """A part whose second measurement fails, and which then fails itself or dies."""

        def __init__(self, end: str) -> None:
            self.end = end

        def rows(self, setting: Any) -> Any:
            attempt = sys.modules["gpu.setting"].attempt
            yield attempt(setting, "one", lambda: {"ms": 1.0})
            yield attempt(setting, "two", lambda: {"ms": 1 / 0})
            if self.end == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(self.end)

    for name, end in (("machine", "no end"), ("ranks", "dies")):
        monkeypatch.setitem(sys.modules, f"gpu.{name}", Part(end))
    path = tmp_path / "out.jsonl"
    script["run_parts"](["machine", "ranks"], "cpu", True, path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    failed = [row.get("failed") for row in rows]
    wrong = "ZeroDivisionError: division by zero"
    assert failed == [None, wrong, "ValueError: no end", None, wrong, "ended with exit code -9"]
    sys.modules["gpu.summary"].print_summary(rows)
    assert "failed: machine: two: ZeroDivisionError" in capsys.readouterr().out


def test_idle_time_is_what_no_kernel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    idle_share = functions("profile_step.py", monkeypatch)["idle_share"]
    assert idle_share([]) == 0
    assert idle_share([(6, 10), (0, 2), (1, 4), (7, 8)]) == pytest.approx(2 / 10)


@pytest.mark.slow
def test_both_libraries_train_whole_epochs_from_the_same_files(tmp_path: Path) -> None:
    for package in ("pandas", "webdataset"):  # open_clip_train needs them
        pytest.importorskip(package)
    file = tmp_path / "epoch.json"
    done = run("epoch.py", "--model", "ViT-tiny-16-64", "--batch", 800, "--epochs", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    training, whole = json.loads(file.read_text(encoding="utf-8"))
    assert (training["name"], whole["name"]) == tuple(f"epoch/ViT-tiny-16-64/fp32/{x}" for x in ("training", "whole"))
    for side in ("peers", "ours"):
        assert 0 < training[side] < whole[side]  # the whole epoch includes validation
    # The peer encodes 32 positions of every caption; forward and backward matrix products of two steps.
    positions, blocks, projections = 2 * 800 * 32, 2 * 12 * 256**2, 256**2 / 32
    text = 3 * 2 * positions * (blocks + projections)
    assert training["figures"]["peers_gflop"] > text / 1e9
    assert training["figures"]["our_gflop"] < training["figures"]["peers_gflop"]


ALL_HELP = """
import contextlib, io, os, runpy, sys
sys.path.insert(0, os.getcwd())
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    print(output.getvalue().startswith("usage:"), script)
"""


def test_every_benchmark_has_a_help_text(tmp_path: Path) -> None:
    scripts = [name for name in SCRIPTS if name != "open_clip_train_with.py"]  # its help is the peer's
    (tmp_path / "all_help.py").write_text(ALL_HELP)
    program = forks.Program(forks.script, [str(tmp_path / "all_help.py"), *scripts], BENCHMARKS, {**os.environ})
    (done,) = forks.run([program], timeout=120)
    assert done.stdout.splitlines() == [f"True {name}" for name in scripts], done.stderr


def test_the_last_batch_of_a_table_is_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = functions("epoch.py", monkeypatch)
    (tmp_path / "icons.csv").write_text(
        "image,caption\na/1.png,one\na/2.png,two\na/3.png,three\na/4.png,four\n", encoding="utf-8"
    )
    epoch["write_tables"](tmp_path, epoch["split_table"](tmp_path / "icons.csv", 2))
    train, val = ((tmp_path / f"{name}.tsv").read_text(encoding="utf-8").splitlines() for name in ("train", "val"))
    assert train == ["filepath\ttitle", f"{tmp_path}/a/1.png\tone", f"{tmp_path}/a/2.png\ttwo"]
    assert [row.split("\t")[1] for row in val] == ["title", "three", "four"]
    with pytest.raises(SystemExit, match="4 pairs are fewer than two batches of 3"):
        epoch["split_table"](tmp_path / "icons.csv", 3)


class Colours(LabelledImages):
    """Images of one colour each."""

    def __init__(self) -> None:
        self.class_names = [f"{i}" for i in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (40, 40), tuple(self.colour(index))), index

    @staticmethod
    def colour(index: int) -> list[int]:
        return [255 * (index % 2), 255 * (index // 2 % 2), 20 * index]

    def labels(self) -> list[int]:
        return list(range(12))


class MeanColours:
    """A model whose features of a place are its mean colour beside white's, and of a text its class's."""

    preprocessing = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_patches(self, images: Tensor, normalize: bool) -> Tensor:
        colours = F.avg_pool2d(images, 8)
        return F.normalize(torch.cat([colours, 1 - colours], dim=1), dim=1)

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        return self.encode_patches(images, normalize).mean((2, 3))

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([Colours.colour(int(text)) for text in texts])

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        colours = tokens / 255
        return F.normalize(torch.cat([colours, 1 - colours], dim=1), dim=1)


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (2, 1)])
def test_places_are_counted_in_the_part_of_the_grid_that_they_lie_in(
    grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = functions("places.py", monkeypatch)
    places = script["Places"](MeanColours(), Colours(), "{}")
    queries = script["draw_queries"](places.labels, grid[0] * grid[1], 30, 0)
    for peaks in (places.composed(queries, grid, 32), places.separate(queries)):
        assert peaks.right(queries) == 1
        assert peaks.false_alarms() == 0
        wrong = [query._replace(asked=1 - query.asked % 2) for query in queries]
        assert peaks.right(wrong) == 0


# Calls are timed together where the host would otherwise wait for the device after each of them.


SPEED = runpy.run_path(str(ROOT / "benchmarks/device_speed.py"))
CALLS, matmul_peak, seconds_between, seconds_per_call = (
    SPEED[name] for name in ("CALLS", "matmul_peak", "seconds_between", "seconds_per_call")
)


class Event:
    """A CUDA event whose time is the number of calls so far, in milliseconds."""

    log: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = float(self.log.count("call"))

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: Any) -> float:
        return other.time - self.time


def test_calls_on_cuda_are_timed_with_one_wait_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    assert seconds_per_call(lambda: Event.log.append("call"), torch.device("cuda")) == pytest.approx(1e-3)
    assert Event.log == ["call"] * CALLS + ["wait"]


def test_one_call_is_timed_on_a_cpu() -> None:
    calls: list[int] = []
    assert 0 < seconds_per_call(lambda: calls.append(1), torch.device("cpu")) < 1
    assert calls == [1]
    assert seconds_per_call(lambda: calls.append(1), torch.device("cpu"), 4) < 1
    assert len(calls) == 5
    assert seconds_between(2.0, 5.0) == 3


def test_the_matrix_product_peak_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    since = time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1)
    elapsed = time.perf_counter() - since
    assert torch.equal(torch.get_rng_state(), state)
    assert peak >= 2 * 2 * 512**3 / elapsed  # at least two products of at least that size ran in that time


def test_memory_of_the_loss_grows_linearly_with_the_batch_and_with_the_devices_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU three tiles of 2^25 numbers instead of 2^21; a batch smaller than a tile takes what it needs."""
    loss_bytes = functions("scaling.py", monkeypatch)["loss_bytes"]
    for world in (1, 8):
        assert 1.5 < loss_bytes(32_768, world, 512) / loss_bytes(16_384, world, 512) <= 2
    assert loss_bytes(16_384, 8, 512, "cuda") - loss_bytes(16_384, 8, 512) == 3 * 4 * (2**25 - 2**21)
    assert loss_bytes(256, 8, 512, "cuda") == loss_bytes(256, 8, 512)
