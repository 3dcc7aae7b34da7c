"""The processor and the commit of a measurement."""

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name where the system tells it, else its architecture."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Short hash of HEAD, with a `+` where package or recipes differ from it; empty without a checkout or git."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "trl_lambda", "recipes/**/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
