"""The `lit-clip` command: which command is meant, LightningCLI for those with a configuration, and where runs lie."""
