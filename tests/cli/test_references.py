"""Settings that refer to the environment: resolved for the run, references in all that the run writes and prints."""

import base64
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lit_clip import LitCLIP
from tests.conftest import TINY_YAML
from tests.helpers.towers import save_family, saved, text_config

Cli = Callable[..., CompletedProcess[str]]
SECRET = "c4nary-s3cret"
OWN_DATA = """\
from typing import Any

import datamodules


class Secretive(datamodules.Captions):
    def __init__(self, *args: Any, secret: str = "", count: int = 0, more: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        assert secret == "c4nary-s3cret" and more["b"] == [secret, secret, "none"] == more["c"], more
        self.save_hyperparameters("count")
"""
SETTINGS = f"""
model: {{architecture: {TINY_YAML}}}
data:
  class_path: own_data.Secretive
  init_args:
    train: ${{oc.env:TABLE}}
    val: ${{.train}}
    batch_size: ${{oc.env:COUNT}}
    count: ${{oc.env:COUNT}}
    num_workers: 0
    secret: ${{oc.env:PASSWORD}}
    more:
      a: https://me:${{oc.env:PASSWORD}}@host
      b: ['${{oc.env:PASSWORD,none}}', '${{data.init_args.secret}}', '${{oc.env:MISSING,none}}']
      c: ${{..more.b}}
      d: ['${{oc.decode:${{oc.env:COUNT}}}}']
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 1
  enable_progress_bar: false
  log_every_n_steps: 1
  logger:
    - {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: runs, name: csv}}}}
    - {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: x}}}}
"""


@pytest.fixture
def environment(tmp_path: Path, caption_table: Path) -> dict[str, str]:
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    (tmp_path / "secret.yaml").write_text(SETTINGS)
    return {"PASSWORD": SECRET, "COUNT": "8", "TABLE": str(caption_table), "PYTHONPATH": str(tmp_path)}


def assert_nowhere(secret: str, folder: Path, *results: CompletedProcess[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("own_data.py", "own_data.pyc")]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert len(files) > 3
    forms = (secret, base64.b64encode(secret.encode()).decode())
    assert not [path for path in files for form in forms if form.encode() in path.read_bytes()]
    for result in results:
        assert secret not in result.stdout + result.stderr


def test_no_file_or_message_of_a_run_holds_a_secret_and_the_saved_config_resumes_it(
    cli: Cli, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = partial(cli, environment=environment)
    first = run("fit", "--config", "secret.yaml")
    assert first.returncode == 0, first.stderr
    saved = tmp_path / "runs/csv/version_0/fit_config.yaml"
    kept = yaml.safe_load(saved.read_text())["data"]["init_args"]
    wanted = yaml.safe_load(SETTINGS)["data"]["init_args"]
    assert {name: kept[name] for name in ("train", "batch_size", "secret")} == {
        name: wanted[name] for name in ("train", "batch_size", "secret")
    }
    assert (kept["more"]["a"], kept["more"]["d"]) == (wanted["more"]["a"], wanted["more"]["d"])
    # Not in this process: typing's cache has one order for Optional[Union[int, float]] and another test's opposite.
    printed = run("fit", "--config", str(saved), "--print_config")
    assert printed.stdout == saved.read_text()
    more = run("fit", "--config", str(saved), "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert more.returncode == 0, more.stderr
    (checkpoint,) = (tmp_path / "runs/csv/version_1/checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 4
    settings = content["datamodule_hyper_parameters"]
    assert settings["count"] == 8
    plan = run("fit", "--config", str(saved), "--print_plan")
    assert_nowhere(SECRET, tmp_path, first, printed, more, plan)
    checked = run("validate", "--config", str(saved), "--ckpt_path", str(checkpoint))
    assert checked.returncode == 0, checked.stderr
    unset = cli("fit", "--config", str(saved), environment={**environment, "PASSWORD": "another"})
    assert "AssertionError" in unset.stderr  # it is the environment that counts, not what was saved


class Guarded(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802  # http.server's name
        wanted = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") == wanted:
            super().do_GET()
        else:
            self.send_error(401)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A table behind a password; two of its ten images are missing."""
    folder = tmp_path_factory.mktemp("site")
    for number in range(8):
        Image.new("RGB", (40, 40), (number * 30, 0, 0)).save(folder / f"{number}.png")
    rows = [f"{number}.png,caption {number}" for number in range(10)]
    (folder / "t.csv").write_text("\n".join(["image,caption", *rows]))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:{SECRET}@127.0.0.1:{server.server_port}/t.csv"
        server.shutdown()


def test_a_password_typed_in_an_address_is_not_saved(cli: Cli, in_process: Cli, tmp_path: Path, address: str) -> None:
    limits = ("--data.bad_samples", "{on_error: skip, max_skipped: 0.5}", "--trainer.max_steps", "5")
    model = ("--model.architecture", TINY_YAML, "--trainer.accelerator", "cpu", "--data.num_workers", "0")
    done = cli("fit", "--data.train", address, "--data.val", address, *limits, *model, "--data.batch_size", "4")
    assert done.returncode == 0, done.stderr
    (config,), (skipped,) = tmp_path.rglob("fit_config.yaml"), tmp_path.rglob("skipped.jsonl")
    assert "http://me:***@127.0.0.1" in skipped.read_text()
    assert_nowhere(SECRET, tmp_path, done)
    again = in_process("fit", "--config", str(config))
    assert again.returncode == 2
    assert "data.train: *** stands for a secret that was not saved; type --data.train with it" in again.stderr


# A checkpoint is data: none of its settings makes the command line import a module or read a file that it names.


OWN = {"class_path": "never_imported.Part"}
SCHEDULES = "torch.optim.lr_scheduler"
LOOKAHEAD = "timm.optim.lookahead.Lookahead"  # of arguments without types


def described(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


@pytest.fixture
def printing(
    in_process: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Parse ``fit`` with a checkpoint of other settings in a folder with a module."""
    (tmp_path / "never_imported.py").write_text("open('imported', 'w')\nclass Part: pass\ndef part(*_): return 1.0\n")
    (tmp_path / "settings.yaml").write_text("class_path: never_imported.Part\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "never_imported", raising=False)

    def run_main(settings: dict[str, Any], *words: str) -> CompletedProcess[str]:
        checkpoint = torch.load(tiny_checkpoint, weights_only=True)
        checkpoint["hyper_parameters"] |= settings
        torch.save(checkpoint, "changed.ckpt")
        return in_process("fit", "--ckpt_path", "changed.ckpt", "--print_config", *words)

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
        {"decay": described("lit_clip.tools.class_paths.import_modules", modules=["never_imported"], why="")},
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
    assert printing(settings).returncode in (0, 2)
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


def test_plain_settings_are_taken_from_a_checkpoint_and_parts_are_refused(printing: Cli) -> None:
    settings = {
        "freeze": {"image": {"unlock_last": 1}, "text": "all"},
        "lora": {"r": 4, "alpha": 8.0},
    }
    printed = printing(settings)
    assert printed.returncode == 0
    assert "unlock_last: 1" in printed.stdout
    assert "alpha: 8.0" in printed.stdout
    for name, part in {"optimizer": "torch.optim.sgd.SGD", "loss": "lit_clip.losses.pairwise.Contrastive"}.items():
        refused = printing({name: described(part)})
        assert refused.returncode == 2
        assert f"may not have {name}, a part; a checkpoint holds data alone" in refused.stderr


def test_no_module_of_the_working_folder_is_run_that_nobody_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("json", "sys", "yaml", "torch", "typeshed_client", "sitecustomize"):  # beside somebody's images
        (tmp_path / f"{name}.py").write_text('open("RAN", "w").close()\n', encoding="utf-8")
    cli("fit", "--print_config", new=True)
    assert not (tmp_path / "RAN").exists()
