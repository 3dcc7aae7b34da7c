"""
`trl-lambda`, the command.

    trl-lambda train --config run.yaml
    trl-lambda report OUTPUT_DIR --html
    trl-lambda --version
"""

import argparse
import sys

from . import __version__

EPILOG = """\
commands:
  train    train a model; --config names a YAML file, --help lists the options
  report   draw a finished or running run from its output folder

Several processes: accelerate launch -m trl_lambda.training --config run.yaml
"""


def main(arguments: list[str] | None = None) -> None:
    """
    Hand the command line on to the command that it begins with.

    Args:
        arguments (`list[str]`, *optional*):
            The command line; that of the process if not given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="trl-lambda",
        description="Token aggregation for TRL's GRPOTrainer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=("train", "report"), metavar="train | report")
    command, rest = parser.parse_args(arguments[:1]).command, arguments[1:]
    # Imported here: TRL takes seconds to import, which neither --version nor --help should.
    if command == "train":
        from .training import main as train

        train(rest)
    else:
        from .report import main as report

        report(rest)


if __name__ == "__main__":
    main()
