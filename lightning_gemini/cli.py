"""The `lightning-gemini` command: finds the subcommand, and imports only what that one needs."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

# Subcommands that need no Trainer: name -> "module:function", a function that takes the arguments after the
# name. All others belong to LightningCLI, whose import costs seconds.
COMMANDS: dict[str, str] = {}


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, by default the process's own, without the program's name."""
    arguments = sys.argv[1:] if args is None else args
    command = arguments[0] if arguments else None
    if command == "--version":
        print(f"lightning-gemini {version('lightning-gemini')}")
    elif command in COMMANDS:
        module, function = COMMANDS[command].split(":")
        getattr(importlib.import_module(module), function)(arguments[1:])
    else:
        from lightning_gemini.lightning_cli import GeminiCLI

        GeminiCLI(args)


if __name__ == "__main__":
    main()
