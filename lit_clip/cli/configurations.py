"""Which runs have the same configuration: whose checkpoints ``--ckpt_path last`` may take."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lit_clip.tools.hashing import hex_digest

Configuration = dict[str, list[str]]
"""Digests of settings, by name; a resumed run has those of the run that it goes on from, too."""
# Settings that a run may be resumed with; of the optimiser only the class has to stay.
MAY_DIFFER = {"model.lr_scheduler", "model.decay", "model.micro_batch_size"} | {
    f"data.{name}"
    for name in ("batch_size", "global_batch_size", "num_workers", "on_error", "max_skipped", "val", "test", "predict")
}
UNSET = ""
OWN = ("data", "model.loss")  # what a resumed run may have changed; the rest stays, however it is written


def configuration(parser: Any, config: Any) -> Configuration:
    """Return what two runs with the same configuration share: model, loss, class of the optimiser and data.

    Args:
        parser: of the command; it dumps ``config`` as it is saved, so that references stay what they are.
        config: the command's settings.
    """
    settings = yaml.safe_load(parser.dump(config, skip_none=False))
    named = (each for section in ("model", "data") for each in _named(section, settings.get(section)))
    return {name: [_digest(value)] for name, value in named}


def evaluated(ours: Configuration) -> Configuration:
    """Return the settings that a command without training sets for its model; the data may be others."""
    counts = {name for name in ours if name.startswith("model") and name not in ("model.loss", "model.optimizer")}
    return {name: digests for name, digests in ours.items() if name in counts and digests != [UNSET]}


def _digest(value: Any) -> str:
    return UNSET if value is None else hex_digest([json.dumps(value, sort_keys=True, default=str)])


def _named(section: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a section that count."""
    value = _without_packages(value)
    arguments = value.get("init_args", value) if isinstance(value, Mapping) else {}
    yield section, value.get("class_path") if isinstance(value, Mapping) else value
    for key, setting in arguments.items():
        name = f"{section}.{key}"
        if name == "model.optimizer" and isinstance(setting, Mapping):
            yield name, setting.get("class_path")
        elif key != "class_path" and name not in MAY_DIFFER:
            yield name, setting


def _without_packages(value: Any) -> Any:
    """Return settings with the bare names of classes: packages offer a class under several paths."""
    if isinstance(value, Mapping):
        last = {"class_path": str(value["class_path"]).rpartition(".")[2]} if "class_path" in value else {}
        return {name: _without_packages(each) for name, each in value.items()} | last
    return [_without_packages(each) for each in value] if isinstance(value, list) else value


def joined(own: Configuration, before: Any) -> Configuration:
    """Return the configuration of a run that goes on from another one; ``before`` is what its checkpoint holds."""
    if not isinstance(before, Mapping):
        return own
    kept = {name: _known(before, name) for name in own if not name.startswith(OWN)}
    return {name: [*dict.fromkeys([*kept.get(name, ()), *digests])] for name, digests in own.items()}


def differences(ours: Configuration, saved: Any) -> list[str]:
    """Return the names of the settings in which a checkpoint's configuration differs.

    Args:
        ours: of this command, or a part of it.
        saved: what the checkpoint holds: anything, or None in one that no command has written.
    """
    if ours and not isinstance(saved, Mapping):
        return ["not of this command"]
    return [name for name in ours if name in saved and not {*ours[name]} & {*_known(saved, name)}]


def _known(saved: Mapping[Any, Any], name: str) -> list[str]:
    digests = saved.get(name)
    return [each for each in digests if isinstance(each, str)] if isinstance(digests, list) else []
