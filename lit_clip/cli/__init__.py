"""The `lit-clip` command: dispatch to a command, LightningCLI for those with a configuration, run folders."""
