"""The documents that a person reads, and what can be taken out of them: fences, links."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Older ones, whose links are checked too.
MORE_PAGES = [*sorted((ROOT / "recipes").glob("**/README.md")), ROOT / "CHANGELOG.md"]


def name(path: Path) -> str:
    """A path as a reader names it."""
    return str(path.relative_to(ROOT))


def fences(path: Path, language: str) -> list[str]:
    """The code fences of a language, at the beginning of a line."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[tuple[str, str]]:
    """The commands of a page's bash fences, lines joined and blanks evened: command, comment."""
    found = []
    for fence in fences(path, "bash"):
        for line in fence.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("  #")
            if command.strip() and not command.startswith("#"):
                found.append((" ".join(command.split()), comment.strip()))
    return found


def prose(path: Path) -> str:
    """A page without its fences."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """The targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path)))


def anchors(path: Path) -> set[str]:
    """What a link can point to in a page: its headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    spelt = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    return set(spelt)
