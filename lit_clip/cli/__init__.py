"""The `lit-clip` command: command dispatch, LightningCLI for commands with a configuration, and run folders."""
