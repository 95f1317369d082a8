"""Answers to options and commands that other tools have, above all open_clip's training command."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lit_clip.errors import InputError

COMMANDS = {  # with dashes
    "train": "fit",
    "training": "fit",
    "pretrain": "fit",
    "finetune": "fit",
    "fine-tune": "fit",
    "resume": "fit",
    "distill": "fit",
    "eval": "evaluate",
    "evaluation": "evaluate",
    "benchmark": "evaluate",
    "zero-shot": "evaluate",
    "zeroshot": "evaluate",
    "linear-probe": "evaluate",
    "probe": "evaluate",
    "test-zero-shot": "evaluate",
    "test-retrieval": "validate",
    "val": "validate",
    "encode": "embed",
    "features": "embed",
    "extract": "embed",
    "infer": "classify",
    "retrieve": "search",
    "convert": "export",
    "list": "models",
    "list-models": "models",
    "wiseft": "wise-ft",
}

# By their names without leading dashes and with underscores. An answer that is one option gets the typed value.
_BY_DEFAULT = "not needed: "
OPTIONS = {
    # data
    "train": "--data.train",
    "train_data": "--data.train",
    "val": "--data.val",
    "val_data": "--data.val",
    "batch_size": "--data.batch_size",
    "bs": "--data.batch_size",
    "global_batch_size": "--data.global_batch_size",
    "workers": "--data.num_workers",
    "num_workers": "--data.num_workers",
    "csv_img_key": "--data.columns.image",
    "csv_caption_key": "--data.columns.caption",
    "csv_separator": _BY_DEFAULT + "the separator of a table is detected",
    "dataset_type": _BY_DEFAULT + "--data.train detects the format of its path",
    "train_num_samples": _BY_DEFAULT + "samples are counted; --trainer.limit_train_batches uses fewer batches",
    "val_num_samples": _BY_DEFAULT + "samples are counted; --trainer.limit_val_batches uses fewer batches",
    "train_data_upsampling_factors": "use a list of {data: PATH, weight: NUMBER} as data.train in a YAML file",
    "dataset_resampled": "there is none: an epoch has every sample once; data.train takes a weighted mixture",
    "aug_cfg": "use --data.augmentation.crop_scale and its siblings",
    "image_mean": "it belongs to the model: use a preprocessing section in --model.architecture",
    "image_std": "it belongs to the model: use a preprocessing section in --model.architecture",
    "image_interpolation": "it belongs to the model: use a preprocessing section in --model.architecture",
    "image_resize_mode": "it belongs to the model: use a preprocessing section in --model.architecture",
    "imagenet_val": "use configs/zero_shot_imagenet.yaml, or callbacks.ZeroShot among --trainer.callbacks",
    "imagenet_v2": "use a suite with lit-clip evaluate, or callbacks.ZeroShot among --trainer.callbacks",
    "zeroshot_frequency": "use every_n_epochs of callbacks.ZeroShot",
    # model
    "arch": "--model.architecture",
    "architecture": "--model.architecture",
    "pretrained": "--model.pretrained",
    "pretrained_image": "use weights of an image encoder in --model.architecture",
    "image_size": "--model.image_size",
    "force_image_size": "--model.image_size",
    "context_length": "--model.context_length",
    "force_context_length": "--model.context_length",
    "force_quick_gelu": "use the -quickgelu variant of --model.architecture, such as ViT-B-32-quickgelu",
    "force_custom_text": _BY_DEFAULT + "weights of both layouts are read",
    "force_patch_dropout": "use --trainer.callbacks+=callbacks.PatchDropout --trainer.callbacks.share 0.5",
    "lock_image": "use --model.freeze.image all",
    "lock_image_unlocked_groups": 'use --model.freeze.image "{unlock_last: 1}"',
    "lock_image_freeze_bn_stats": _BY_DEFAULT + "frozen layers keep BatchNorm's statistics",
    "lock_text": "use --model.freeze.text all",
    "lock_text_unlocked_layers": 'use --model.freeze.text "{unlock_last: 1}"',
    "lock_text_freeze_layer_norm": _BY_DEFAULT + "LayerNorm is frozen with its layer",
    "grad_checkpointing": "use --trainer.callbacks+=callbacks.ActivationCheckpointing",
    "torchcompile": "use --trainer.callbacks+=callbacks.Compile",
    "torchscript": "there is none; --trainer.callbacks+=callbacks.Compile compiles the model",
    "trace": "there is none; --trainer.callbacks+=callbacks.Compile compiles the model",
    "use_bnb_linear": "there is none; lit-clip trains in float32, bf16-mixed or 16-mixed (--trainer.precision)",
    "cache_dir": "set the environment variable HF_HOME, the folder of downloaded weights",
    # loss
    "siglip": "use a SigLIP architecture, such as --model.architecture ViT-B-16-SigLIP",
    "local_loss": _BY_DEFAULT + "each rank computes its part of the loss over all ranks' pairs",
    "gather_with_grad": _BY_DEFAULT + "gradients are those of the loss over all ranks' pairs",
    "loss_dist_impl": _BY_DEFAULT + "there is one implementation, with the gradients of one big batch",
    "accum_freq": "use --model.micro_batch_size: pairs encoded at once, of a --data.batch_size of all of them",
    "distill_model": "the teacher is an option of the distillation loss; see distillation in docs/finetuning.md",
    "distill_pretrained": "the teacher is an option of the distillation loss; see distillation in docs/finetuning.md",
    "coca_caption_loss_weight": "CoCa is not supported",
    "coca_contrastive_loss_weight": "CoCa is not supported",
    # optimiser
    "lr": "--model.optimizer.lr",
    "learning_rate": "--model.optimizer.lr",
    "model.lr": "--model.optimizer.lr",
    "wd": "--model.optimizer.weight_decay",
    "weight_decay": "--model.optimizer.weight_decay",
    "beta1": 'use --model.optimizer.betas "[0.9, 0.98]"',
    "beta2": 'use --model.optimizer.betas "[0.9, 0.98]"',
    "eps": "--model.optimizer.eps",
    "momentum": "it is an option of the optimiser; see --model.optimizer",
    "opt": "use --model.optimizer",
    "optimizer": "use --model.optimizer",
    "scheduler": "use --model.lr_scheduler",
    "lr_scheduler": "use --model.lr_scheduler",
    "skip_scheduler": "use --model.lr_scheduler",
    "epochs_cooldown": "use --model.lr_scheduler",
    "lr_cooldown_end": "use --model.lr_scheduler",
    "lr_cooldown_power": "use --model.lr_scheduler",
    "warmup": "--model.lr_scheduler.warmup_steps",
    "warmup_steps": "--model.lr_scheduler.warmup_steps",
    "grad_clip_norm": "--trainer.gradient_clip_val",
    # trainer
    "epochs": "--trainer.max_epochs",
    "num_epochs": "--trainer.max_epochs",
    "steps": "--trainer.max_steps",
    "val_frequency": "--trainer.check_val_every_n_epoch",
    "precision": "use --trainer.precision with bf16-mixed, 16-mixed or 32-true",
    "amp": "use --trainer.precision with bf16-mixed, 16-mixed or 32-true",
    "fp16": "use --trainer.precision 16-mixed",
    "bf16": "use --trainer.precision bf16-mixed",
    "device": "use --trainer.accelerator with cpu, gpu or auto",
    "gpus": "--trainer.devices",
    "devices": "--trainer.devices",
    "nodes": "--trainer.num_nodes",
    "dist_url": _BY_DEFAULT + "torchrun or SLURM say where the ranks meet",
    "dist_backend": "use --trainer.strategy",
    "ddp_static_graph": "use --trainer.strategy",
    "no_set_device_rank": "use --trainer.devices",
    "horovod": "there is none; use --trainer.strategy ddp, which is the default on several devices",
    "use_bn_sync": "use --trainer.sync_batchnorm true",
    "seed": "--seed_everything",
    "resume": "use --ckpt_path with last or the path of a checkpoint",
    "checkpoint": "--ckpt_path",
    "debug": "use --trainer.fast_dev_run true",
    # files and logs
    "save_frequency": "use every_n_epochs of ModelCheckpoint among --trainer.callbacks",
    "save_most_recent": _BY_DEFAULT + "last.ckpt is the last epoch's, with the packaged defaults",
    "delete_previous_checkpoint": _BY_DEFAULT + "last.ckpt replaces the epoch's before, with the packaged defaults",
    "output": "--trainer.logger.init_args.save_dir",
    "output_dir": "--trainer.logger.init_args.save_dir",
    "logs": "--trainer.logger.init_args.save_dir",
    "name": "--trainer.logger.init_args.name",
    "log_local": _BY_DEFAULT + "the first rank writes the logs",
    "log_every_n_steps": "--trainer.log_every_n_steps",
    "report_to": "use --trainer.logger with TensorBoardLogger, WandbLogger, MLFlowLogger or CSVLogger",
    "wandb": "use --trainer.logger WandbLogger",
    "wandb_project_name": "use --trainer.logger WandbLogger --trainer.logger.project NAME",
    "wandb_notes": "there is none; use --trainer.logger WandbLogger --trainer.logger.name NAME",
    "copy_codebase": "there is none; fit_config.yaml in the run's folder holds all settings",
    "remote_sync": "there is none; use ModelCheckpoint's dirpath, which may be an address such as s3://...",
    "remote_sync_frequency": "there is none; use ModelCheckpoint's dirpath, which may be an address such as s3://...",
    "remote_sync_protocol": "there is none; use ModelCheckpoint's dirpath, which may be an address such as s3://...",
}


def command_for(word: str) -> str | None:
    """Return the command of lit-clip that does what another tool calls ``word``; None if unknown."""
    return COMMANDS.get(word.lower().replace("_", "-"))


def check_options(words: Sequence[str]) -> None:
    """Refuse another tool's options with the one to use instead.

    Args:
        words: arguments of one of LightningCLI's commands.
    """
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        following = words[i + 1] if i + 1 < len(words) else ""
        problem = _problem(option, value if equals else "" if following.startswith("--") else following)
        if problem:
            raise InputError(f"{option}: {problem}")


def _problem(option: str, value: str) -> str:
    """Return what is wrong and what to do instead; empty for an option that is not another tool's."""
    if option == "--model" and _is_model(value):
        return f"{value} is a model's name, not a class or a YAML file; use --model.architecture {value}"
    if option == "--data" and _is_data(value):
        return f"{value} is a path, not a class or a YAML file; use {shlex.join(['--data.train', value])}"
    name = option.removeprefix("--").replace("-", "_")
    if not option.startswith("--") or name not in OPTIONS:
        return ""
    answer = OPTIONS[name]
    if answer.startswith("--"):
        answer = f"use {shlex.join([answer, *([value] if value else [])])}"
    return f"no such option; {answer}"


def _is_model(value: str) -> bool:
    """Return whether a value of ``--model`` is a model's name, not a class or a YAML file."""
    if not value or Path(value).suffix in (".yaml", ".yml"):
        return False
    from lit_clip.models.open_clip_configs import open_clip_names
    from lit_clip.models.registry import list_models

    return value in {*list_models(), *open_clip_names()}


def _is_data(value: str) -> bool:
    """Return whether a value of ``--data`` is a path of data, not a class or a YAML file."""
    return bool(value) and Path(value).suffix not in (".yaml", ".yml") and Path(value).exists()
