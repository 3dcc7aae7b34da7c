"""
TRL's own tests of its GRPO trainer: as they are, then with this package's two classes under TRL's two names.

    python tests/support/trl_suite.py --repository ../trl                    # a clone of TRL, near --version
    python tests/support/trl_suite.py --repository ../trl --version 1.16.0   # the same tests on another TRL

Three runs: TRL's classes; the package's with `length_weight=None`; the package's as they are. A refusal may end a
test otherwise than with TRL's classes, nothing else may. Without weights each training ends with the same parameters,
bit for bit. Needs no network: the models are stand-ins, and zen is two rows unless a test counts them. Tests of images
fail in all three runs; those that need a GPU, vLLM or Liger are skipped.
"""

import argparse
import functools
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl  # before pytest puts the clone, which has a trl too, on the path
from trl_suite_hub import LARGE, OWNER, SMALL, make_zen, use_vocabulary, write_hub
from versions import ROOT, install

RUNS = {"trl": "TRL's classes", "none": "length_weight=None", "learned": "λ learned"}
NOT_RUN = {"outcome": "not run", "error": "", "refused": False, "trained": []}


class Plugin:
    """In pytest: the stand-ins, the swapped names, and a line about each test."""

    def __init__(self, args: argparse.Namespace, hub: Path) -> None:
        self.args, self.hub, self.zen, self.trained = args, hub, make_zen(args.repository), []
        datasets.load_dataset = self.load_dataset
        train = transformers.Trainer.train

        def train_and_record(trainer, *args, **kwargs):
            result = train(trainer, *args, **kwargs)
            bits = [zlib.crc32(p.detach().contiguous().view(torch.uint8).numpy()) for p in trainer.model.parameters()]
            self.trained.append(zlib.crc32(repr(bits).encode()))
            return result

        transformers.Trainer.train = train_and_record

    def load_dataset(self, path: str, name: str, split: str | None = None, streaming: bool = False):
        if path != f"{OWNER}/zen":
            raise ConnectionError(f"no stand-in for {path}")
        splits = datasets.DatasetDict({key: rows.take(self.rows) for key, rows in self.zen[name].items()})
        chosen = splits[split] if split else splits
        return chosen.to_iterable_dataset() if streaming else chosen

    def pytest_runtest_setup(self, item) -> None:
        source = inspect.getsource(item.function)
        self.rows = 17 if "call_count" in source else 2
        transformers.set_seed(0)  # a model may be made before its trainer sets a seed
        # Tests that write tokens by number, and one that relies on the end being a rare token.
        use_vocabulary(self.hub, LARGE if "151645" in source or "all_masked" in item.name else SMALL)

    def pytest_collection_modifyitems(self, items) -> None:
        if self.args.run == "trl":
            return
        from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

        unweighted = functools.partial(LambdaGRPOConfig, length_weight=None)
        for module in {item.module for item in items}:
            module.GRPOTrainer = LambdaGRPOTrainer
            module.GRPOConfig = unweighted if self.args.run == "none" else LambdaGRPOConfig

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        refused = is_refusal(call.excinfo and call.excinfo.value)  # the clone's conftest.py takes the traceback away
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed):
            line = {
                "test": item.nodeid.split("::", 1)[1],
                "outcome": report.outcome,
                "error": call.excinfo.exconly() if call.excinfo else "",
                "refused": refused,
                "trained": self.trained,
            }
            with self.args.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trained = []
        return report


def is_refusal(error: BaseException | None) -> bool:
    """Whether a `ValueError` of this package is the error, or came where the test expected another one."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and frames and ROOT / "trl_lambda" in Path(frames[-1].filename).parents:
            return True
        error = error.__context__
    return False


def run_here(args: argparse.Namespace) -> int:
    """The tests in this process."""
    if trl.__version__ != args.version:
        raise ValueError(f"TRL {trl.__version__} was imported instead of {args.version}")
    hub = Path(os.environ["HF_HOME"]) / "hub"
    if not hub.exists():
        write_hub(hub, args.repository)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", args.k, "--rootdir", str(args.repository)]
    return pytest.main([*options, str(args.repository / "tests/test_grpo_trainer.py")], plugins=[Plugin(args, hub)])


def run(name: str, paths: list[Path], args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """The tests in a process of their own: test -> its line."""
    lines = folder / f"{name}.jsonl"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HOME": str(folder / "home")}
    command = [sys.executable, __file__, "--repository", args.repository, "--version", args.version, "-k", args.k]
    output = subprocess.run(
        [*command, "--run", name, "--lines", lines],
        env=environment | {"HF_HUB_OFFLINE": "1"}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if not lines.exists():
        sys.exit(output.stdout[-3000:] + output.stderr[-3000:])
    return {line["test"]: line for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines())}


def differences(name: str, theirs: dict[str, dict], ours: dict[str, dict]) -> tuple[list[str], list[str]]:
    """Tests that a refusal of this package ends otherwise, and tests that something else does."""
    refused, unexplained = [], []
    for test in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(test, NOT_RUN), ours.get(test, NOT_RUN)
        if a["outcome"] != b["outcome"] or a["error"].split(":")[0] != b["error"].split(":")[0]:
            (refused if b["refused"] else unexplained).append(f"{test}: {a['outcome']}, {b['outcome']}: {b['error']}")
        elif name == "none" and a["trained"] != b["trained"]:
            unexplained.append(f"{test}: other parameters after training")
    return refused, unexplained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repository", type=lambda text: Path(text).resolve(), required=True, help="a clone of TRL")
    parser.add_argument("--version", default="1.10.0", help="the TRL that is installed and tested")
    parser.add_argument("--folder", type=lambda text: Path(text).resolve(), default=ROOT / ".versions")
    parser.add_argument("-k", default="", help="pytest's selection")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        sys.exit(run_here(args))
    # TRL skips its tests of tools without jmespath.
    paths = [install(args.version, args.folder), install("1.0.1", args.folder, "jmespath"), ROOT]
    results, failed = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for name, title in RUNS.items():
            results[name] = run(name, paths, args, Path(folder))
            counts = Counter(line["outcome"] for line in results[name].values()).items()
            trainings = sum(len(line["trained"]) for line in results[name].values())
            print(f"{title}: {', '.join(f'{n} {end}' for end, n in counts)}; {trainings} trainings", flush=True)
            refused, unexplained = differences(name, results["trl"], results[name])
            for line in [*(f"refused: {line}" for line in refused), *(f"unexplained: {line}" for line in unexplained)]:
                print(" ", " ".join(line.split()))
            failed = failed or bool(unexplained)
    sys.exit(failed)


if __name__ == "__main__":
    main()
