"""Signal handlers of a run: they record the signal; ranks act on it at a point that all of them reach."""

import signal
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn


class Signals(_SignalConnector):
    """Record signals and do nothing else in the handler.

    Lightning's own handlers broadcast and save inside the handler, at a point that other ranks have not reached, and
    ranks hang. Outside ``fit`` there is nothing to save, and a signal ends the process as it does any other program.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received = 0  # number of the signal that this process got
        self.agreed = 0  # number of the signal that all ranks agreed on

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False
        self._original_handlers = self._get_current_signal_handlers()
        if self.trainer.state.fn == TrainerFn.FITTING:
            for signum in {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), self.requeue_signal} - {None}:
                self._register_signal(signum, self._note)

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
        """Save where Lightning looks first when the job runs again, and put the job back into the queue."""
        self._slurm_sigusr_handler_fn(self.agreed, None)  # pyright: ignore[reportArgumentType]  # it needs no frame

    def teardown(self) -> None:
        if not self.agreed:  # otherwise this process is about to end, and a second signal must not change how
            super().teardown()


def signals_of(trainer: Trainer) -> Signals:
    """Return the trainer's signal handlers."""
    connector: Any = trainer._signal_connector
    return connector
