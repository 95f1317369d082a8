"""Every option of Lightning and every callback of ours with its outcome: works, as its checks show, or refused.

``docs/evidence/combinations.md`` is made from this table, which ``tests/test_combinations.py`` runs. A row is one
setting on one process or on two ranks (DDP by gloo); its name and number of ranks identify it.
"""

from benchmarks.combinations import callback_rows, our_rows, strategy_rows, trainer_rows  # noqa: F401  # they add rows
from benchmarks.combinations.our_rows import OWN
from benchmarks.combinations.rows import PLAIN, ROWS, Row

__all__ = ["ELSEWHERE", "OWN", "PLAIN", "ROWS", "Row"]

# Names of Lightning that have no row, by the reason.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "works; run by `make test-loggers`": ("MLFlowLogger", "WandbLogger"),
    "not tried; needs an account": ("CometLogger", "LitLogger", "model_registry"),
    "not tried; needs a TPU": ("XLAProfiler",),
    "refused with its strategy": (
        "DeepSpeedPrecision",
        "FSDPPrecision",
        "deepspeed",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3",
        "deepspeed_stage_3_offload",
        "deepspeed_stage_3_offload_nvme",
        "fsdp",
        "fsdp_cpu_offload",
        "single_tpu",
        "single_xla",
        "xla",
        "xla_debug",
    ),
    "base class": ("CheckpointIO", "Logger", "ParallelStrategy", "Profiler", "ProgressBar", "Strategy"),
    "refused with the callback that it adds": ("Tuner.lr_find", "Tuner.scale_batch_size"),
    "set by every row": ("callbacks", "plugins", "strategy"),
}
