"""
The documents that a person reads: their fences, links, and the measures of their prose.

    python tests/support/documents.py    # the measures of each page
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages of recipes and studies, and the changelog: their links are checked too.
MORE_PAGES = [*sorted((ROOT / "recipes").glob("**/README.md")), ROOT / "CHANGELOG.md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """The commands of a page's bash fences, lines joined and blanks evened."""
    lines = "\n".join(fences(path, "bash")).replace("\\\n", " ").splitlines()
    found = (" ".join(line.partition("  #")[0].split()) for line in lines)
    return [command for command in found if command and not command.startswith("#")]


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path)))


def anchors(path: Path) -> set[str]:
    """The targets of links into a page: its headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def visible(text: str) -> str:
    """A page's text without fences, inline code, formulas, comments, link targets and tables that a program writes."""
    text = re.sub(r"<!-- \w+: begin -->.*?<!-- \w+: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```|\$\$.*?\$\$|<!--.*?-->|^:::.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))


def sentences(text: str, *, tables: bool = False) -> list[str]:
    """The sentences of paragraphs and list items of `visible` text, and the cells of its tables if asked for."""
    blocks = [""]
    for line in map(str.strip, text.splitlines()):
        if line.startswith("|"):
            blocks += [*line.strip("|").split("|"), ""] if tables else [""]
        elif not line or line.startswith("#"):
            blocks.append("")
        elif re.match(r"[-*>] |\d+\. ", line):
            blocks.append(re.sub(r"^([-*>]|\d+\.) ", "", line))
        else:
            blocks[-1] += " " + line
    found = [part for block in blocks for part in re.split(r"(?<=[.?!])\*{0,2}\s+(?=[^a-z])", block)]
    return [sentence.strip("* ") for sentence in found if words(sentence)]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-zλμπ][\w'’.-]*|\d[\d,.]*", text)


def measures(text: str) -> dict[str, float]:
    """Semicolons and "what" as a noun per 100 words, tables included, and the mean number of words in a sentence."""
    text = visible(text)
    everything, running = sentences(text, tables=True), sentences(text)
    count = max(len(words(" ".join(everything))), 1)
    statements = [sentence for sentence in everything if not sentence.endswith("?")]  # "what" opens a question
    return {
        "semicolons": 100 * sum(sentence.count(";") for sentence in everything) / count,
        "what": 100 * sum(word.lower() == "what" for word in words(" ".join(statements))) / count,
        "length": len(words(" ".join(running))) / max(len(running), 1),
    }


if __name__ == "__main__":
    for path in PAGES:
        values = measures(path.read_text(encoding="utf-8"))
        print(f"{name(path):28} " + "  ".join(f"{key} {value:5.2f}" for key, value in values.items()))
