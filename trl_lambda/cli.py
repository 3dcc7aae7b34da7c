"""The command `trl-lambda`: `train` and `report` take over what follows them."""

import argparse
import sys

from . import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (the process's own if `None`) begin with."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="trl-lambda", description="Train with TRL's GRPO script, and draw a run.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="train | report", required=True)
    commands.add_parser("train", help="train a model: --config names a YAML file, --help lists the options")
    commands.add_parser("report", help="draw a finished or running run from its output folder")
    command = parser.parse_args(arguments[:1]).command
    # Imported here: importing TRL takes seconds.
    if command == "train":
        from .scripts.grpo import train

        train(arguments[1:])
    else:
        from .report import main as report

        report(arguments[1:])


if __name__ == "__main__":
    main()
