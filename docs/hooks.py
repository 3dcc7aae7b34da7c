"""For the site: docstrings are written as TRL's are, and shown as a reader of pages expects."""

import re

# `str`, *optional*, defaults to `x`: Markdown, shown as it stands and with the default once more behind it.
_TYPE = re.compile(r"\(<code>(\[?`[^<]*)</code>(?:, default:\s*<code>.*?</code>\s*)?\)", re.DOTALL)
_REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")  # [`LengthWeight`], [`~trl.GRPOConfig`]


def on_page_content(html: str, **kwargs: object) -> str:
    """Show types without their marks, and a reference to a class as its name."""
    html = _TYPE.sub(lambda match: f"({re.sub(r'[`*]', '', match[1])})", html)
    return _REFERENCE.sub(r"<code>\1</code>", html)
