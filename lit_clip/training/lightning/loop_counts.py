"""Progress of a run: in its checkpoints, and in Lightning's loops when it resumes.

Lightning 2.6 saves the counts of its loops as they are in the hook that saves, and guesses from them where it was. Some
guesses are wrong: after an epoch's last step a resumed run counts that epoch twice in its next checkpoint; with
``max_steps`` a resumed run takes a new epoch for one under way, and logs one step too late. So a checkpoint has one of
three forms, whatever saved it:

- between epochs: all counts of epochs are those of complete epochs, and no batch of the next one is counted
- within an epoch: the last batch is complete but for its end (``completed``), from where Lightning takes the next one
- an epoch's last batch is complete, its validation or its end is not: callbacks have to see the end
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Trainer


def settle_counts(checkpoint: dict[str, Any]) -> None:
    """Write the position of a run into its checkpoint, in one of three forms; in place."""
    loops = _fit_loop(checkpoint)
    batches = loops.get("epoch_loop.batch_progress")
    if not batches:
        return
    epochs = loops["epoch_progress"]
    done = batches["current"]["processed"]  # of an interrupted batch only ready and started are counted
    ended = batches["is_last_batch"] and done == batches["current"]["ready"]
    between = done == 0 or (ended and epochs["current"]["processed"] == epochs["current"]["started"])
    for counts in (epochs["total"], epochs["current"]):
        # Lightning also counts an epoch as processed that max_steps has ended before its last batch.
        complete = counts["processed"] if between else counts["started"] - 1
        counts |= dict.fromkeys(counts, complete) if between else {"processed": complete, "completed": complete}
    for counts in (batches["total"], batches["current"]):
        counts |= dict.fromkeys(counts, counts["processed"])
        counts["completed"] -= not (between or ended)
    batches["is_last_batch"] = ended and not between
    if between:
        batches["current"] = dict.fromkeys(batches["current"], 0)
    else:
        checkpoint["epoch"] = epochs["current"]["completed"]
    # Steps that loggers count: that of a batch whose end is still to come is counted then.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - (not between)
    validated = loops["epoch_loop.val_loop.batch_progress"]  # one that was interrupted begins anew
    validated["is_last_batch"] = False
    for each in ("total", "current"):
        validated[each] = dict.fromkeys(validated[each], 0)


def resumed_counts(checkpoint: Mapping[str, Any], batches_per_epoch: int | None) -> tuple[int, int]:
    """Return the complete epochs, and the steps in them, of the checkpoint from which a run resumes.

    With another batch size an epoch may have more batches now (``batches_per_epoch``). One whose last batch is complete
    counts as many, in place; Lightning would take more.
    """
    loops = _fit_loop(checkpoint)
    batches, steps = loops.get("epoch_loop.batch_progress"), checkpoint.get("global_step", 0)
    if not batches:
        return 0, 0
    complete, counts = loops["epoch_progress"]["current"]["completed"], batches["current"]
    if not batches["is_last_batch"]:
        return complete, steps - counts["processed"]
    batches["current"] = {name: max(count, batches_per_epoch or 0) for name, count in counts.items()}
    return complete + 1, steps


def enter_epoch(trainer: Trainer) -> None:
    """Make a resumed run begin where its checkpoint says; called when training starts."""
    loop: Any = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    batches = epoch_loop.batch_progress
    if not epoch_loop.restarting:
        return
    if batches.is_last_batch and not validation_due(trainer):
        # Lightning would look for a further batch. Only after a validation does it go to the epoch's end.
        epoch_loop._batches_that_stepped += 1
        epoch_loop.run = partial(_leave, epoch_loop)
    if not batches.current.ready:  # with max_steps Lightning restarts the epoch loop also between epochs
        epoch_loop.restarting = False


def _leave(epoch_loop: Any, data_fetcher: Any) -> None:
    """Skip an epoch with only complete batches: it ends at once, and the next epoch runs as usual."""
    del epoch_loop.run
    epoch_loop.restarting = False


def validation_due(trainer: Trainer) -> bool:
    """Return whether the training loop validates after the step that has just ended."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate_after_step(trainer: Trainer) -> None:
    """Validate as the training loop does after a step, and log at that step."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False
    trainer.validating = True
    first_iteration = trainer._logger_connector._first_loop_iter
    loop.val_loop.run()
    loop.val_loop._has_run = False  # otherwise the training loop takes the current epoch for a finished one
    trainer._logger_connector._first_loop_iter = first_iteration
    trainer.training = True


def _fit_loop(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return checkpoint.get("loops", {}).get("fit_loop", {})
