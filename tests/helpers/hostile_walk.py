"""Open a checkpoint again and again, each time with one value changed; a process of its own, as a case may hang.

python -m tests.helpers.hostile_walk CHECKPOINT ENTRY prints a JSON line for each case: what was changed, and the line
that it ended in, or a problem: another exception, or something that happened on behalf of the file.
"""

import copy
import itertools
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from lit_clip import LitCLIP, load_model
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from tests.helpers.watching import watching

VALUES = Path(__file__).parents[1] / "corpus/settings/values.yaml"
HOSTILE = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
MEMORY = 8 * 2**30
MORE = [("_instantiator",), ("_class_path",)]
MORE += [("architecture", "image", key) for key in ("class_path", "timm", "pretrained")]
MORE += [("architecture", "text", key) for key in ("class_path", "hugging_face", "tokenizer", "model")]
OTHERS = ("parts", "tokenizer", "base", "weights", "before", "loss", "hparams", "module_arguments", "random_states")


def keys(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(values, dict):
        for name, value in values.items():
            yield from keys(value, (*at, name))


def changed(values: dict[str, Any], at: tuple[Any, ...], new: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    inner = values
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = new
    return values


def odd_values() -> list[Any]:
    """Return values that a YAML file cannot hold."""
    loop: list[Any] = []
    loop.append(loop)
    tensors = [torch.zeros(3), torch.eye(2).to_sparse(), torch.zeros(1).expand(10**11), torch.empty(2, device="meta")]
    return [*HOSTILE, loop, 1j, {1, 2}, {1: 2}, "a" * 10**6, torch.float16, *tensors]


def resume() -> None:
    settings = torch.load("whole.ckpt", weights_only=True)["hyper_parameters"]
    module = LitCLIP(CLIPConfig.from_dict(settings["architecture"]))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, limit_val_batches=0, **quiet)
    nothing: Any = []
    trainer.validate(module, torch.utils.data.DataLoader(nothing), ckpt_path="hostile.ckpt", verbose=False)


ENTRIES: dict[str, Callable[[], Any]] = {
    "load_model": lambda: load_model("hostile.ckpt"),
    "load_from_checkpoint": lambda: LitCLIP.load_from_checkpoint("hostile.ckpt"),
    "resume": resume,
}


def outcome(run: Callable[[], Any]) -> dict[str, str]:
    with watching(Path.cwd(), ("hostile.ckpt", "whole.ckpt"), "never_imported") as events:
        try:
            run()
            result = {}
        except InputError as error:
            odd = "\n" in str(error) or "org/secret" in str(error).replace("'org/secret'", "")
            result = {"problem" if odd else "line": str(error)[:300]}
        except Exception as error:
            result = {"problem": f"{type(error).__name__}: {error}"[:300]}
    return {"problem": str(events)} if events else result


def walk(path: str, entry: str) -> Iterator[dict[str, str]]:
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint, "hostile.ckpt")
    yield {"case": "untouched", **outcome(ENTRIES[entry])}
    every = [at for at in keys(checkpoint) if at[0] != "state_dict" or len(at) == 1]
    every += [("hyper_parameters", *at) for at in MORE] + [(name,) for name in OTHERS]
    # Each value goes to some of the keys, so that all keys and all values are met, and neighbours differ.
    for i, (at, (j, value)) in enumerate(itertools.product(every, enumerate(odd_values()))):
        if (i + j) % 11 == 0:
            torch.save(changed(checkpoint, at, value), "hostile.ckpt")
            yield {"case": f"{'.'.join(map(str, at))} = {repr(value)[:80]}", **outcome(ENTRIES[entry])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for case in walk(*sys.argv[1:]):
        sys.stdout.write(f"{json.dumps(case)}\n")
        sys.stdout.flush()
