"""
Build wheel and sdist, check them, install the wheel into an environment that has never seen the checkout, and train,
draw and launch there from an empty folder, offline.

    python tests/support/release.py --outdir dist

The environment is clean of this package, not of its dependencies: torch and the rest are those of the calling Python.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

import offline  # noqa: F401
from stand_ins import write_model

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# JSON is YAML.
CONFIG = {
    "model_name_or_path": "model", "dataset_name": "data", "reward_funcs": "my_reward.brevity", "output_dir": "out",
    "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
}  # fmt: skip
REWARD = "def brevity(completions, **kwargs):\n    return [-float(len(text)) for text in completions]\n"


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    words, pipes = [str(part) for part in command], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, cwd=cwd, env=env, text=True, **pipes)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def build(outdir: Path) -> tuple[Path, Path]:
    """
    Wheel and sdist, both through `twine check --strict`, from a copy of what git tracks, so that nothing else
    gets in. The copy's README, which a package index shows, has absolute links.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    tracked = run("git", "ls-files", "-z", "trl_lambda", "pyproject.toml", "README.md", "LICENSE", cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, tracked.split("\0")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        readme, links = Path(folder, "README.md"), f"]({PROJECT['urls']['Repository']}/blob/main/"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(re.sub(r"\]\((?!https?:|#)", links, text), encoding="utf-8")
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", outdir.resolve(), folder)
    (wheel,), (sdist,) = outdir.glob("*.whl"), outdir.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def clean_environment(folder: Path, wheel: Path) -> Path:
    """
    An environment with the wheel and, by a path of this Python's, with its dependencies. An editable install of the
    package in this Python is a `.pth` file, which is not read in folders that another `.pth` names.
    """
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    python = folder / "bin" / "python"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install")
    run(*pip, "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return folder / "bin"


def use(bin_folder: Path, folder: Path) -> dict[str, str]:
    """Use the package from an empty folder, as a user does who has no checkout: what each command printed."""
    write_model(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text('{"prompt": "aeo"}\n{"prompt": "oa"}\n')
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(json.dumps(CONFIG))
    command, python = bin_folder / "trl-lambda", bin_folder / "python"
    launch = (python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "-m")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # no path to the checkout
    place = {"cwd": folder, "env": kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}}
    return {
        "where": run(python, "-c", "import trl_lambda; print(trl_lambda.__file__)", **place),
        "version": run(command, "--version", **place),
        "train": run(command, "train", "--config", "run.yaml", **place),
        "report": run(command, "report", "out", "--html", **place),
        "launch": run(*launch, "trl_lambda.scripts.grpo", "--config", "run.yaml", "--output_dir", "two", **place),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--outdir", type=Path, default=Path("dist"))
    args = parser.parse_args()
    for old in (*args.outdir.glob("*.whl"), *args.outdir.glob("*.tar.gz")):
        old.unlink()
    wheel, sdist = build(args.outdir)
    with tempfile.TemporaryDirectory() as folder:
        (empty := Path(folder, "empty")).mkdir()
        printed = use(clean_environment(Path(folder, "env"), wheel), empty)
    print(printed["version"].strip())
    print("Summary" + printed["train"].partition("Summary")[2].rstrip())
    print(f"{wheel}: {len(names(wheel))} files; {sdist}: {len(names(sdist))} files; trained, drawn, launched.")


if __name__ == "__main__":
    main()
