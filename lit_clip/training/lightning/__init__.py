"""Everything that changes Lightning or reads its private parts.

Outside of this room only :class:`callbacks.EMA` uses protected attributes, of Lightning's own callback that it extends.
Seen in Lightning 2.6.6. After an upgrade read this table, and run ``tests/training/lightning/test_patches.py``: each of
its tests fails when Lightning no longer does what makes the patch necessary.

- ``signals``: Lightning's handlers save and broadcast within the handler, where other ranks are not, and its loop
  broadcasts before every step, which waits for the device.
- ``checkpoint_io``: Lightning ignores a file that it may not write; its asynchronous plugin removes a checkpoint before
  the next one is on the disk; a checkpoint at an address may hold a program; each rank reads a whole one into memory.
- ``resume_checks``: Lightning restores states unchecked, and deletes files that they name.
- ``run_folder``: ``trainer.log_dir`` is not the run's folder for all loggers; two runs that start at once get the same
  version of a logger; the address of MLflow's store has no public name.
- ``strategies``: DDP by name has a second copy of all gradients, and synchronises buffers in each rank's first batch of
  a validation; torch's converter, which Lightning uses, drops the activation in timm's BatchNorm.
  A logger's own state has no public name. Lightning kills the first rank a few seconds after another one fails, without
  an error of its own.
- ``loop_counts``: Lightning guesses from its loops' counts where a checkpoint was saved, and resumes wrongly from an
  epoch's last step. When a validation is due, and how to run one between two steps, have no public names.
- ``fsdp``: Lightning's strategies for shards cannot hold a scalar, and restore before the module sees a checkpoint.
- ``sharded_checkpoints``: how ``fsdp`` saves; torch's format of shards is pickled.
- ``command_line``: LightningCLI lets a checkpoint's settings override typed ones, builds every command's parser, and
  turns Ctrl-C into exit code 1.
"""
