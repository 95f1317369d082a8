"""Lightning moves each number that is logged, with a copy of its settings, to the device where it is already.

That is 0.4 ms a number and step, a tenth of the time of a step of a tiny model.
"""

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector import result

_move = result._ResultMetric.to


def _stay_or_move(metric: Any, device: Any, **options: Any) -> Any:
    stays = metric.is_tensor and metric.value.device == torch.device(device)
    return metric if stays else _move(metric, device, **options)


def leave_logged_numbers() -> None:
    """Leave numbers that are on the right device where they are."""
    result._ResultMetric.to = _stay_or_move
