"""The `lightning-gemini` command; imports only what it needs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, by default the process's own, without the program's name."""
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["--version"]:
        print(f"lightning-gemini {version('lightning-gemini')}")
    elif arguments and arguments[0] in SUBCOMMANDS:
        describe, function = SUBCOMMANDS[arguments[0]]
        parser = ArgumentParser(f"lightning-gemini {arguments[0]}")
        describe(parser)
        settings = parser.parse_args(arguments[1:])
        module, _, name = function.partition(":")
        getattr(import_module(module), name)(**vars(settings))  # not needed for the help
    else:
        from lightning_gemini.lightning_cli import GeminiCLI  # an import of seconds

        GeminiCLI(args)


def _report(parser: ArgumentParser) -> None:
    parser.description = (
        "Print the memory report of a run, and draw one of its steps: device memory against the budget, where each "
        "chunk is, copies and waits. Reads the newest gemini_step.json."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="the folder of a run, searched at any depth, or the file itself"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="the picture, also .pdf or .svg (default: beside the step's file)"
    )


def _verify(parser: ArgumentParser) -> None:
    parser.description = (
        "Compare every byte of a checkpoint with its checksums, and print what is in it. The exit code is 1 if it is "
        "damaged."
    )
    parser.add_argument("path", metavar="CHECKPOINT", help="a sharded checkpoint's folder, or a checkpoint in one file")


def _consolidate(parser: ArgumentParser) -> None:
    parser.description = (
        "Make one ordinary Lightning file of a sharded checkpoint; plain Lightning loads it and goes on training. "
        "One tensor at a time is in memory."
    )
    parser.add_argument("folder", metavar="DIR", help="the sharded checkpoint")
    parser.add_argument("out", metavar="OUT.ckpt", help="the file to write")
    parser.add_argument(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="also load objects of any class that callbacks have saved, which can run any code: if you trust the file",
    )


def _export(parser: ArgumentParser) -> None:
    parser.description = (
        "Write the models of transformers in a sharded checkpoint as from_pretrained reads them: weights in "
        "safetensors files, configuration, tokenizer; of models with adapters of peft these alone."
    )
    parser.add_argument("checkpoint", metavar="DIR", help="a sharded checkpoint, or its URL")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a folder that does not exist or is empty")
    parser.add_argument("--format", choices=["huggingface"], default="huggingface", help="the only one so far")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as in the checkpoint)"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", help="a tokenizer to put beside the model (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="the most bytes of weights in a file (default: 5GB)"
    )


#: Those without a Trainer: what declares the arguments, and the function (module:name) that they are for.
SUBCOMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], str]] = {
    "report": (_report, "lightning_gemini.report_cli:report"),
    "verify": (_verify, "lightning_gemini.checkpoint_cli:verify"),
    "consolidate": (_consolidate, "lightning_gemini.checkpoint_cli:consolidate"),
    "export": (_export, "lightning_gemini.export_cli:export"),
}


if __name__ == "__main__":
    main()
