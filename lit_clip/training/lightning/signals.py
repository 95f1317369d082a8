"""Signal handlers of a run: they record the signal; ranks act on it at a point that all of them reach."""

import signal
import sys
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_clip.errors import printable
from lit_clip.tools import hardware
from lit_clip.tools.hardware import HostCopy


class Signals(_SignalConnector):
    """Only record signals in the handler; outside ``fit``, a signal ends the process as usual."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received = 0  # number of the signal that this process got
        self.agreed = 0  # number of the signal that all ranks agreed on
        self.outcome = ""  # on the first rank, what became of the run that the signal ended
        self._unread: list[HostCopy] = []  # how many ranks got each signal, of the last steps

    @property
    def _numbers(self) -> list[int]:
        """Numbers of the signals that end a run, in the same order on every rank."""
        return sorted({signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), self.requeue_signal} - {None})

    def flags(self, like: Tensor) -> list[Tensor]:
        """Return a scalar for each signal, 1 if this process got it; made on ``like``'s device without a copy."""
        return [like.new_full((1,), float(self.received == number)) for number in self._numbers]

    def note(self, counts: Tensor) -> None:
        """Keep the sum of the ranks' :meth:`flags` for a later read."""
        self._unread.append(HostCopy(counts))

    def read(self, device: torch.device) -> bool:
        """Read the ranks' decision of this step, or of the last one if that avoids waiting; False if there is none."""
        if not self._unread:
            return False
        latest = len(self._unread) > 1 or not hardware.runs_ahead(device)
        counts = self._unread.pop(0).read() if latest else []
        got = [number for number, count in zip(self._numbers, counts, strict=False) if count]
        self.agreed = max(got, default=0)
        return True

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False
        self._original_handlers = self._get_current_signal_handlers()
        if self.trainer.state.fn == TrainerFn.FITTING:
            for number in self._numbers:
                self._register_signal(signal.Signals(number), self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self.received = signum

    @property
    def requeue_signal(self) -> signal.Signals | None:
        """The signal that puts the job back into SLURM's queue; None without requeueing."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return environment.requeue_signal
        return None

    def requeue(self) -> None:
        """Save where Lightning looks first when the job runs again, then put the job back into the queue."""
        self._slurm_sigusr_handler_fn(self.agreed, None)  # pyright: ignore[reportArgumentType]  # it needs no frame

    def teardown(self) -> None:
        if not self.agreed:  # otherwise this process is about to end, and a second signal must not change how
            super().teardown()
        elif self.outcome:  # the last that a trainer does, so that nothing follows the line
            sys.stderr.write(f"lit-clip: {printable(self.outcome)}\n")
            self.outcome = ""


def replace_signals(trainer: Trainer) -> Signals:
    """Give a trainer :class:`Signals` instead of Lightning's handlers, without a broadcast before every step."""
    trainer._signal_connector = signals = Signals(trainer)
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # its ranks read what the first one sends, and wait for the device
    return signals


def signals_of(trainer: Trainer) -> Signals | None:
    """Return the trainer's signal handlers; None if they are Lightning's own."""
    connector: Any = trainer._signal_connector
    return connector if isinstance(connector, Signals) else None
