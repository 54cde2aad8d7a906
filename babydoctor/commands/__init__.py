"""The subcommands, one module a group. They import nothing heavy until one of them runs."""
