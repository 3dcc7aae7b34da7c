"""What a picture or a page may be called."""

import os
from pathlib import Path

PICTURES, PAGES = (".png",), (".html", ".htm")


def check_ending(argument: str, path: str | os.PathLike[str], accepted: tuple[str, ...]) -> Path:
    """
    Return `path` as a `Path` whose ending says what is written there.

    Raises:
        ValueError: if it ends in none of `accepted`; the message begins with `argument`.
    """
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() not in accepted:
        found = os.fspath(path) if isinstance(path, os.PathLike) else path
        endings = " or ".join(sorted(set(accepted) - {".htm"}))
        also = " (.htm is a page too)" if ".htm" in accepted else ""
        raise ValueError(f"{argument} is {found!r}; accepted: a name that ends in {endings}{also}.")
    return Path(path)
