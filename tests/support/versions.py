"""
Contract, parity and matrix on other versions of TRL, each installed without its dependencies into a folder of its own.

    python tests/support/versions.py --folder .versions            # all of them
    python tests/support/versions.py --folder .versions --reduced  # the oldest, and part of the tests

The installed torch, transformers and accelerate stay: only TRL changes.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
REDUCED_TESTS = ("trl_seam/test_contract.py", "trainer/test_parity.py")
TESTS = (*REDUCED_TESTS, "trl_seam/test_refusals.py", "trainer/test_config.py", "trainer/test_loss.py")


def tested_versions() -> list[str]:
    """Read from the contract's text, so that no TRL has to be imported here."""
    text = (ROOT / "trl_lambda" / "trl_seam" / "contract.py").read_text(encoding="utf-8")
    return re.findall(r'"([\d.]+)"', re.search(r"TESTED_VERSIONS = \((.*?)\)", text).group(1))


def install(version: str, folder: Path, package: str = "trl") -> Path:
    """`pip install --no-deps package==version` into `folder`/version, unless it is there."""
    target = folder / version
    if not (target / package).is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--target", str(target), f"{package}=={version}"], check=True)
    return target


def run(version: str, target: Path, reduced: bool) -> tuple[int, int, float, list[str]]:
    """Run the tests and the matrix: tests passed, comparisons, largest deviation, and what went wrong."""
    environment = os.environ | {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)

    found = python("-c", "import trl; print(trl.__version__)").stdout.strip()
    if found != version:
        return 0, 0, 0.0, [f"TRL {found} was imported instead of {version}"]
    files = [f"tests/{name}" for name in (REDUCED_TESTS if reduced else TESTS)]
    # Warnings are errors with the pinned TRL alone: another one has its own.
    tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *files)
    passed = re.search(r"(\d+) passed", tests.stdout)
    problems = re.findall(r"^(?:FAILED|ERROR) .*", tests.stdout, re.MULTILINE)
    if tests.returncode and not problems:
        problems = [tests.stdout[-2000:] + tests.stderr[-2000:]]
    matrix = python("tests/support/matrix.py", "--reduced")
    line = re.search(r"^matrix: (\d+) comparisons, largest deviation (\S+)", matrix.stdout, re.MULTILINE)
    if matrix.returncode or line is None:
        problems.append(f"matrix: {matrix.stdout[-1000:]}{matrix.stderr[-1000:]}")
    comparisons, deviation = (int(line[1]), float(line[2])) if line else (0, 0.0)
    return int(passed[1]) if passed else 0, comparisons, deviation, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions")
    parser.add_argument("--reduced", action="store_true", help="the oldest version and part of the tests")
    args = parser.parse_args()
    versions = tested_versions()
    totals, failed = [0, 0, 0.0], False
    for version in versions[:1] if args.reduced else versions:
        passed, comparisons, deviation, problems = run(version, install(version, args.folder), args.reduced)
        print(f"TRL {version}: {passed} tests passed, {comparisons} comparisons, largest deviation {deviation:.1e}")
        print(*problems, sep="\n", end="\n" if problems else "", flush=True)
        totals = [totals[0] + passed, totals[1] + comparisons, max(totals[2], deviation)]
        failed = failed or bool(problems)
    print(f"versions: {totals[0]} tests, {totals[1]} comparisons, largest deviation {totals[2]:.1e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
