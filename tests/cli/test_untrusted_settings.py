"""A checkpoint is data: none of its settings makes the command line import a module or read a file that it names."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_clip import LitCLIP
from lit_clip.cli.main import main
from tests.helpers.towers import save_family, saved, text_config

OWN = {"class_path": "never_imported.Part"}
SCHEDULES = "torch.optim.lr_scheduler"
LOOKAHEAD = "timm.optim.lookahead.Lookahead"  # of arguments without types


def described(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


@pytest.fixture
def printing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Parse ``fit`` with a checkpoint of other settings in a folder with a module; return the exit code."""
    (tmp_path / "never_imported.py").write_text("open('imported', 'w')\nclass Part: pass\ndef part(*_): return 1.0\n")
    (tmp_path / "settings.yaml").write_text("class_path: never_imported.Part\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "never_imported", raising=False)

    def run_main(settings: dict[str, Any], *words: str) -> Any:
        checkpoint = torch.load(tiny_checkpoint, weights_only=True)
        checkpoint["hyper_parameters"] |= settings
        torch.save(checkpoint, "changed.ckpt")
        monkeypatch.setattr(sys, "argv", ["lit-clip", "fit", "--ckpt_path", "changed.ckpt", "--print_config", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    yield run_main
    sys.modules.pop("never_imported", None)  # other tests look whether it is there


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": described("lit_clip.tools.untrusted.import_module", name="never_imported")},
        {"optimizer": described("torch.optim.SGD", lr=OWN)},
        {"lr_scheduler": described(f"{SCHEDULES}.LambdaLR", lr_lambda="never_imported.part")},
        {"lr_scheduler": described(f"{SCHEDULES}.MultiplicativeLR", lr_lambda=["never_imported.part"])},
        {"lr_scheduler": described(f"{SCHEDULES}.SequentialLR", schedulers=[OWN], milestones=[1])},
        {"decay": described("lit_clip.cli.imports.import_modules", modules=["never_imported"], why="")},
        {"loss": "settings.yaml"},
        {"loss": described("lit_clip.losses.Sum", terms=["never_imported.Part"])},
        {"loss": described("lit_clip.losses.Sum", terms=["./settings.yaml"])},
        {"loss": described("lit_clip.losses.Matryoshka", loss="never_imported.Part", dims=[4])},
        {"freeze": "./settings.yaml"},
        {"freeze": {"image": "./settings.yaml"}},
        {"lora": "./settings.yaml"},
        {"pretrained": OWN},
        {"optimizer": described(LOOKAHEAD, k="{class_path: never_imported.Part}")},
        {"optimizer": described(LOOKAHEAD, k="class_path: never_imported.Part\ninit_args: {}")},
        {"optimizer": described(LOOKAHEAD, k='[{"cl\\x61ss_path": "never_imported.Part"}]')},
        {"optimizer": described(LOOKAHEAD, k="{a: '{class_path: never_imported.Part}'}")},
    ],
)
def test_nothing_that_a_checkpoint_names_is_imported_or_read(
    settings: dict[str, Any], printing: Callable[..., Any]
) -> None:
    assert printing(settings) in (None, 0, 2)
    assert not Path("imported").exists()


@pytest.mark.parametrize("place", ["image", "text"])
def test_texts_within_an_architecture_create_nothing_either(
    place: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    hidden = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
    checkpoint, _ = saved(LitCLIP(text_config(save_family("bert", tmp_path / "bert"))), tmp_path)
    values = torch.load(checkpoint, weights_only=True)
    towers = values["hyper_parameters"]["architecture"]
    if place == "text":
        towers["text"]["model"]["part"] = hidden
    else:
        towers["image"] = {"timm": "test_vit", "image_size": 32, "options": {"part": hidden}}
    torch.save(values, checkpoint)
    result = cli("validate", "--ckpt_path", str(checkpoint), "--data", "datamodules.Captions", "--data.val", "x.csv")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "may not name a class" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_named_class_gets_nothing_from_a_checkpoint_either(printing: Callable[..., Any]) -> None:
    saved = {"lr_scheduler": described(f"{SCHEDULES}.LambdaLR", lr_lambda="never_imported.part")}
    printing(saved, "--model.lr_scheduler", f"{SCHEDULES}.LambdaLR")
    assert not Path("imported").exists()
    printing({}, "--model.lr_scheduler", f"{SCHEDULES}.LambdaLR", "--model.lr_scheduler.lr_lambda=never_imported.part")
    assert Path("imported").exists()  # the user may name it


def test_plain_settings_are_taken_from_a_checkpoint_and_parts_are_refused(
    printing: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "freeze": {"image": {"unlock_last": 1}, "text": "all"},
        "lora": {"r": 4, "alpha": 8.0, "targets": ["c_fc"]},
    }
    assert printing(settings) in (None, 0)
    printed = capsys.readouterr().out
    assert "unlock_last: 1" in printed
    assert "- c_fc" in printed
    for name, part in {"optimizer": "torch.optim.sgd.SGD", "loss": "lit_clip.losses.pairwise.Contrastive"}.items():
        assert printing({name: described(part)}) == 2
        assert f"may not have {name}, a part; a checkpoint holds data alone" in capsys.readouterr().err


def test_no_module_of_the_working_folder_is_run_that_nobody_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("json", "sys", "yaml", "torch", "typeshed_client", "sitecustomize"):  # beside somebody's images
        (tmp_path / f"{name}.py").write_text('open("RAN", "w").close()\n', encoding="utf-8")
    cli("fit", "--print_config", new=True)
    assert not (tmp_path / "RAN").exists()
