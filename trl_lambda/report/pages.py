"""What the report of a run and a heat map share: file names, the look of a page, a figure as PNG."""

import html
from io import BytesIO
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 1.5em auto; padding: 0 1em; color: #222 }
.panels { display: flex; flex-wrap: wrap; gap: 1em } .panels img { width: 25em; max-width: 100% }
td { padding: .1em 1em .1em 0; overflow-wrap: anywhere }
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { padding: .15em 0; border-right: 1px solid #fff }
.other { color: #555; background: repeating-linear-gradient(45deg, #f6f6f6 0 3px, #cfcfcf 3px 4px) }
.bar { height: 1em; max-width: 24em; border: 1px solid #888 }
.ends { display: flex; justify-content: space-between; gap: 1em; max-width: 24em; text-align: center }
"""


def require_matplotlib() -> None:
    """
    Raises:
        ImportError: if matplotlib cannot be imported, with the extra to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "trl-lambda[plots]"') from error


def write_file(path: str | Path, png: Any, page: Any) -> Path:
    """
    Write what the function for the file's ending returns, into a folder that is made if need be.

    Raises:
        ValueError: if `path` ends in neither `.png` nor `.html`.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"path is {str(path)!r}; accepted: a name that ends in .html or .png.")
    content = (png if path.suffix == ".png" else page)()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def html_page(title: str, body: str) -> bytes:
    """Return a self-contained page. The title is escaped here, the body is HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>"
    body = f"<h1>{html.escape(title)}</h1>\n{body}"
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    return page.encode("utf-8", "replace")


def png_of(figure: Any, **options: Any) -> bytes:
    """Return a matplotlib figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()
