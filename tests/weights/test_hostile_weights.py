"""Somebody's weights are data: opening them works or ends in one line, and runs, reads or asks for nothing else."""

import ast
import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from lit_clip import LitCLIP, load_model
from lit_clip.cli.main import main
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig, VisionTransformerConfig
from tests.helpers.hostile_walk import HOSTILE, changed
from tests.helpers.watching import watching

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds that several cases together may take
FOLDERS = json.loads((ROOT / "tests/corpus/settings/folders.json").read_text(encoding="utf-8"))


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    """A checkpoint of a model of 0.1 million parameters, as training writes it."""
    sizes: dict[str, Any] = {"width": 32, "layers": 1, "heads": 1}
    image = VisionTransformerConfig(image_size=32, patch_size=16, **sizes)
    text = TextTransformerConfig(context_length=8, vocab_size=100, **sizes)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(LitCLIP(CLIPConfig(16, image, text)))
    trainer.save_checkpoint("whole.ckpt")
    return torch.load("whole.ckpt", weights_only=True)


@pytest.fixture(autouse=True)
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module, a file of settings and a secret that files may name, and must not get."""
    (tmp_path / "never_imported.py").write_text("class Part: pass\ndef part(*_, **__): return 1.0\n")
    (tmp_path / "settings.yaml").write_text("class_path: never_imported.Part\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECRET", "org/secret")
    return tmp_path


ENTRIES: dict[str, Callable[[], Any]] = {
    "load_model": lambda: load_model("hostile.ckpt"),
    "load_from_checkpoint": lambda: LitCLIP.load_from_checkpoint("hostile.ckpt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["load_model", "load_from_checkpoint", "resume"])
def test_any_setting_of_a_checkpoint_may_be_any_value(entry: str, checkpoint: dict[str, Any], bait: Path) -> None:
    torch.save(checkpoint, "whole.ckpt")
    words = [sys.executable, "-m", "tests.helpers.hostile_walk", "whole.ckpt", entry]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seen: list[dict[str, Any]] = []
    with Path("seen.jsonl").open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, cwd=bait, env=environment)
        while process.poll() is None:  # a process that hangs is ended, whatever it catches
            before = len(seen)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            seen = [json.loads(line) for line in Path("seen.jsonl").read_text(encoding="utf-8").splitlines()]
            if process.poll() is None and len(seen) == before:
                process.kill()
    assert process.returncode == 0, seen[-1]
    assert not [each for each in seen if each.get("problem")]
    assert seen[0] == {"case": "untouched"}
    assert sum("line" in each for each in seen) > len(seen) / 4  # most values of an architecture are not possible


@pytest.mark.parametrize("value", [HOSTILE[0], "${oc.env:SECRET}", "never_imported.Part"])
def test_the_command_line_imports_and_resolves_nothing_that_a_checkpoint_names(
    value: Any,
    checkpoint: dict[str, Any],
    bait: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-clip", "fit", "--ckpt_path", "hostile.ckpt", "--print_config"])
    for name in checkpoint["hyper_parameters"]:
        torch.save(changed(checkpoint, ("hyper_parameters", name), value), "hostile.ckpt")
        with watching(bait, ("hostile.ckpt",), "never_imported") as events, pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert stopped.value.code in (None, 0, 2)
        assert len(printed.err.strip().splitlines()) <= 1 or stopped.value.code != 2
        assert "org/secret" not in printed.out + printed.err
        assert not events


def test_lightnings_own_loader_gets_no_instantiator_from_a_checkpoint(checkpoint: dict[str, Any]) -> None:
    part = {"class_path": "never_imported.Part"}
    extra = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "freeze": part}
    torch.save(changed(checkpoint, ("hyper_parameters",), checkpoint["hyper_parameters"] | extra), "hostile.ckpt")
    with pytest.raises(InputError, match="_instantiator, which names a loader"):
        LitCLIP.load_from_checkpoint("hostile.ckpt")
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize("key", ["hparams", "module_arguments", "hparams_type", "hparams_name"])
def test_settings_under_lightnings_other_keys_are_refused(key: str, checkpoint: dict[str, Any]) -> None:
    loader = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "lit_clip.module.LitCLIP"}
    for value in (loader if "_" not in key else "freeze", None if key != "hparams_name" else "part"):
        torch.save(checkpoint | {key: value}, "hostile.ckpt")
        with pytest.raises(InputError, match=f"hostile.ckpt: may not have {key}; its settings are hyper_parameters"):
            LitCLIP.load_from_checkpoint("hostile.ckpt")
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize("size", [0, [0, 2], [32, -1]])
def test_an_image_size_below_1_is_refused_naming_the_file(size: Any, checkpoint: dict[str, Any]) -> None:
    torch.save(changed(checkpoint, ("hyper_parameters", "image_size"), size), "hostile.ckpt")
    named = r"hostile.ckpt: hyper_parameters.image_size(\[\d\])?: (0|-1) must be at least 1"
    for run in ENTRIES.values():
        with pytest.raises(InputError, match=named):
            run()


def test_a_checkpoint_without_a_lora_fetches_no_other_weights(checkpoint: dict[str, Any], bait: Path) -> None:
    checkpoint["hyper_parameters"]["pretrained"] = "org/secret"
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        refused = pytest.raises(InputError, match="hyper_parameters.pretrained: only a LoRA's checkpoint has a base")
        with watching(bait, ("hostile.ckpt",), "never_imported") as events, refused:
            run()
        assert not events


def _quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.empty(2, device="meta"), "on the meta device"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, dtype=torch.complex64), "complex"),
        (_quantised(), "quantised"),
        (torch.zeros(1).expand(10**12), "of fewer values"),
        ([1.0], "is of type list"),
        ({"a": torch.zeros(1)}, "is of type dict"),
    ],
)
def test_odd_tensors_are_named(tensor: Any, problem: str, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["ln_final.weight"] = tensor
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        with pytest.raises(InputError, match=f"does not hold tensors by name: 'ln_final.weight'.*{problem}"):
            run()


def test_names_of_weights_are_texts(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"][7] = torch.zeros(1)
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        with pytest.raises(InputError, match="hostile.ckpt: does not hold tensors by name: 7"):
            run()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [({"layers": 10**9}, "layers: 1000000000 must be at most 1000"), ({"width": 65536, "layers": 50}, "do not fit")],
)
def test_a_model_larger_than_its_file_is_refused_before_it_is_created(
    sizes: dict[str, int], problem: str, checkpoint: dict[str, Any]
) -> None:
    checkpoint["hyper_parameters"]["architecture"]["text"] |= sizes
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        with pytest.raises(InputError, match=problem):
            run()


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused() -> None:
    with zipfile.ZipFile("hostile.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(InputError, match="bytes would unpack to 100000000"):
        load_model("hostile.ckpt")


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_timm_opens_nothing_that_an_architecture_names(option: str) -> None:
    with pytest.raises(InputError, match=f"options.{option} is not allowed"):
        TimmConfig("resnet18", options={option: "settings.yaml"})


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "secret.pth"}},
        {"model_type": "timm_wrapper", "architecture": "local-dir:."},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:org/secret"},
        {"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 1},  # asks for a compiler
    ],
)
def test_no_text_encoder_opens_or_starts_anything_when_it_is_created(
    model: dict[str, Any], checkpoint: dict[str, Any], bait: Path
) -> None:
    torch.save({}, "secret.pth")
    Path("config.json").write_text("{}")
    text = {"hugging_face": "org/secret", "pretrained": False, "model": {**model, "pad_token_id": 0}}
    checkpoint["hyper_parameters"]["architecture"]["text"] = text
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    torch.save(checkpoint | {"tokenizer": {"definition": words.to_str(), "pad_id": 0}}, "hostile.ckpt")
    for run in ENTRIES.values():
        refused = pytest.raises(InputError, match="which is no text encoder that lit-clip can use")
        with watching(bait, ("hostile.ckpt",), "never_imported") as events, refused:
            run()
        assert not events


def test_a_checkpoint_without_its_tokenizer_looks_for_none(checkpoint: dict[str, Any], bait: Path) -> None:
    checkpoint["hyper_parameters"]["architecture"]["text"]["tokenizer"] = {"source": "org/secret"}
    torch.save(checkpoint | {"tokenizer": None}, "hostile.ckpt")
    for run in ENTRIES.values():
        with (
            watching(bait, ("hostile.ckpt",), "never_imported") as events,
            pytest.raises(InputError, match="tokenizer"),
        ):
            run()
        assert not events


def test_a_checkpoints_numbers_for_an_imported_class_take_no_memory(checkpoint: dict[str, Any], bait: Path) -> None:
    huge = {"num_heads": 1, "kdim": 10**12}
    image = {"class_path": "torch.nn.MultiheadAttention", "init_args": huge}
    checkpoint["hyper_parameters"]["architecture"]["image"] = image
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        with pytest.raises(InputError, match="MultiheadAttention"):
            run()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_checkpoints_towers_start_from_no_other_weights(tower: str, checkpoint: dict[str, Any], bait: Path) -> None:
    towers = {
        "image": {"timm": "test_vit", "image_size": 32, "pretrained": "secret.pth"},
        "text": {"hugging_face": "org/secret", "pretrained": True, "model": {"model_type": "bert"}},
    }
    checkpoint["hyper_parameters"]["architecture"][tower] = towers[tower]
    torch.save(checkpoint, "hostile.ckpt")
    for run in ENTRIES.values():
        refused = pytest.raises(InputError, match=f"architecture.{tower}.pretrained: .* must be false")
        with watching(bait, ("hostile.ckpt",), "never_imported") as events, refused:
            run()
        assert not events


@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name"])
@pytest.mark.parametrize("outside", ["outside", "./outside", "folder/../outside", ""])
def test_a_published_configuration_opens_no_folder_but_its_own(key: str, outside: str, bait: Path) -> None:
    for folder in (bait / "folder", bait / "outside"):
        folder.mkdir()
    (bait / "outside/config.json").write_text('{"model_type": "bert"}')
    sizes = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32}
    text = {key: outside or str(bait / "outside"), "no_causal_mask": True, "pool_type": "last"}
    values = {
        "embed_dim": 16,
        "vision_cfg": sizes,
        "text_cfg": text if key == "hf_tokenizer_name" else {key: text[key]},
    }
    Path("folder/open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    torch.save({}, "folder/open_clip_pytorch_model.bin")
    allowed = ("open_clip_config.json", "open_clip_pytorch_model.bin")
    refused = pytest.raises(InputError, match="a file or folder outside; name one on the hub there")
    with watching(bait, allowed, "never_imported") as events, refused:
        load_model("folder")
    assert not events


def test_a_lora_whose_base_is_itself_is_refused(checkpoint: dict[str, Any]) -> None:
    checkpoint["hyper_parameters"] |= {"lora": {"r": 1, "alpha": 1.0}, "pretrained": "hostile.ckpt"}
    checkpoint["base"] = {"pretrained": "hostile.ckpt", "sha256": "0" * 64}
    torch.save(checkpoint, "hostile.ckpt")
    with pytest.raises(InputError, match="its LoRA belongs to a model that is made of it"):
        load_model("hostile.ckpt")


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_weights_end_in_one_line(name: str, bait: Path) -> None:
    folder = bait / "folder"
    folder.mkdir()
    for file, content in FOLDERS[name]["files"].items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text.replace("{deep}", "[" * 100_000), encoding="utf-8")
    if FOLDERS[name].get("weights"):
        save_file({"a": torch.zeros(1)}, folder / FOLDERS[name]["weights"])
    with pytest.raises(InputError, match=FOLDERS[name]["line"]) as refused:
        load_model(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


# Calls that can run what a file holds, with the argument that makes them safe; None: none does.
UNSAFE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "yaml.load": None,
    "pickle.load": None,
    "pickle.loads": None,
    "torch.jit.load": None,
    "torch.hub.load": None,
    "marshal.loads": None,
    "eval": None,
    "exec": None,
    "os.system": None,
}
ADMITTED = {"yaml.load": "_UniqueKeyLoader"}  # a SafeLoader


def test_no_reader_of_files_can_run_what_they_hold() -> None:
    found = []
    for file in [
        path for package in ("lit_clip", "callbacks", "datamodules") for path in (ROOT / package).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file
            if not isinstance(node, ast.Call) or (called := ast.unparse(node.func)) not in UNSAFE:
                continue
            safe = UNSAFE[called]
            values = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if safe is not None and values.get(safe[0]) == str(safe[1]):
                continue
            if called in ADMITTED and ADMITTED[called] in ast.unparse(node):
                continue
            found.append(f"{file.name}:{node.lineno} {called}")
    assert not found
