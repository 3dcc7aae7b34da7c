"""For the site: readable types from TRL's docstring style, names that may break in tables, pictures of the studies."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

# `str`, *optional*, defaults to `x`: TRL's Markdown, with the default once more behind it.
_TYPE = re.compile(r"\(<code>(\[?`[^<]*)</code>(?:, default:\s*<code>.*?</code>\s*)?\)", re.DOTALL)
_REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")  # [`LengthWeight`], [`~trl.GRPOConfig`]
_CELL = re.compile(r"<t[dh]\b.*?</t[dh]>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
# Pages name these by their address on GitHub, so that they show there too. The site has copies.
_PICTURES = ("recipes/studies/tokens/results/budget_frontier.png", "recipes/studies/smollm2/results/summary.png")
_RAW = "https://raw.githubusercontent.com/trl-lambda/trl-lambda/main/"


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the studies to the site."""
    root = Path(config.config_file_path).parent
    for picture in _PICTURES:
        files.append(File.generated(config, f"images/{Path(picture).name}", abs_src_path=str(root / picture)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Show the site's copies of those pictures."""
    for picture in _PICTURES:
        markdown = markdown.replace(_RAW + picture, f"images/{Path(picture).name}")
    return markdown


def on_page_content(html: str, **kwargs: Any) -> str:
    """Remove the marks around types and references, and let code in tables break after "/", "_", "=" and dots."""
    html = _TYPE.sub(lambda match: f"({re.sub(r'[`*]', '', match[1])})", html)
    html = _REFERENCE.sub(r"<code>\1</code>", html)
    breaks = re.compile(r"([/_=]|\.(?=[a-z]))")
    return _CELL.sub(lambda cell: _CODE.sub(lambda code: breaks.sub(r"\1<wbr>", code[0]), cell[0]), html)
