"""Leave default callbacks out of a run."""

from lightning.pytorch import Callback


class Without(Callback):
    """Leave out callbacks of :func:`callbacks.defaults`; ``--trainer.callbacks-=NAME`` adds it.

    Args:
        names: class names of the callbacks, such as ProgressLines.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
