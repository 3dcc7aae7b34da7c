"""The report of a run: the picture, the page, the callback that writes both during training, the command."""

import argparse
import base64
import html
import logging
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .history import LogHistory, read_log_history, series, summarize_run
from .pages import html_page, png_of, require_matplotlib, write_file
from .panels import Panel, draw_panel, panels_of, window_of
from .token_heatmap import colour_bar, token_spans

logger = logging.getLogger(__name__)

_SHOWN = 16  # completions on the page


def plot_run(run: LogHistory | str | Path, path: str | Path, *, title: str | None = None) -> Path:
    """
    Draw what a run logged: reward, length, λ, the weights, where the loss lies. What was not logged has no panel.

    Args:
        run (`str`, `Path` or `list[dict]`):
            Output folder of a run, finished or not, or its `trainer.state.log_history`.
        path (`str` or `Path`):
            File to write: a picture (`.png`), or a self-contained page (`.html`) with the panels, the last value of
            every metric and, if `run` is a folder with tables of completions (`log_completions`), the last of them.
        title (`str`, *optional*):
            Name of the run, that of the folder if not given.

    Returns:
        `Path`: the file written.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the folder has no log history, there is nothing to draw, or `path` has another ending.
    """
    require_matplotlib()
    folder = Path(run) if isinstance(run, str | Path) else None
    history = read_log_history(run) if isinstance(run, str | Path) else run
    title = title or (folder.resolve().name if folder else "A run")
    panels = panels_of(history)
    if not panels:
        raise ValueError("the run has not logged anything that a report shows, neither reward nor length.")
    window = window_of(history)
    note = "A: advantage, f: length weight, v: token weight."
    note += f" Dark curves: means of {window} logs." if window > 1 else ""
    return write_file(
        path,
        png=partial(_draw, panels, history, columns=2, title=f"{title}\n{note}"),
        page=lambda: html_page(title, _page_body(panels, history, note) + _last_completions(folder)),
    )


def _draw(panels: list[Panel], history: LogHistory, columns: int, title: str = "") -> bytes:
    """Return the panels as one PNG."""
    # No pyplot, which would change the caller's backend and keep the figure alive.
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows + (0.6 if title else 0)), dpi=150, layout="constrained")
    for number, panel in enumerate(panels, start=1):
        draw_panel(figure.add_subplot(rows, columns, number), panel, history)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, parse_math=False)
    return png_of(figure)


def _page_body(panels: list[Panel], history: LogHistory, note: str) -> str:
    """Return a summary, one picture per panel, so that they fit a screen of any width, and the metrics as HTML."""
    summary = _table([(name, change.replace("->", "→")) for name, change in summarize_run(history)])
    images = []
    for panel in panels:
        png = base64.b64encode(_draw([panel], history, columns=1)).decode("ascii")
        images.append(f'<img alt="{html.escape(panel.title)}" src="data:image/png;base64,{png}">')
    last = []
    for key in sorted({key for entry in history for key in entry} - {"step", "epoch"}):
        points = [point for point in zip(*series(history, key), strict=True) if not math.isnan(point[1])]
        last += [(key, f"{value:.5g}", f"step {step}") for step, value in points[-1:]]
    return (
        f'{summary}<p>{note}</p>\n<div class="panels">{"".join(images)}</div>\n'
        f"<details><summary>Last value of every metric</summary>{_table(last)}</details>\n"
    )


def _table(rows: list[Any]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _last_completions(folder: Path | None) -> str:
    """Return completions of the last table that TRL wrote (`log_completions`) as HTML, shaded by weight."""
    from pyarrow.parquet import read_table  # comes with `datasets`

    files = sorted((folder / "completions").glob("completions_*.parquet"), reverse=True) if folder else []
    tables = (read_table(file).to_pylist() for file in files)
    # Not one of an evaluation with a single completion per prompt, where every advantage is 0.
    rows = next((table for table in tables if any(row["advantage"] for row in table)), [])[:_SHOWN]
    if not rows:
        return ""
    largest = max(abs(row["advantage"] or 0.0) for row in rows) or 1.0
    key = colour_bar("|A|, before f and v", (0, largest))
    parts = [f"<h2>Completions of step {rows[0]['step']}</h2><p>Darker ones count more.</p>{key}"]
    for row in rows:
        advantage = row["advantage"] or 0.0  # pandas wrote NaN as None
        prompt, completion = (_text(row[column]) for column in ("prompt", "completion"))
        parts.append(f"<p>A = {advantage:+.2f}. Prompt: {html.escape(prompt)}</p>")
        parts.append(f'<p class="tokens">{token_spans([completion], [abs(advantage) / largest], [advantage])}</p>')
    return "\n".join(parts)


def _text(messages: Any) -> str:
    """Return a prompt or completion as text, a conversation with its roles."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"[{message['role']}] {message.get('content') or ''}" for message in messages)


class ReportCallback(TrainerCallback):
    """
    Write `report.png`, and on request `report.html`, into `output_dir` during training and at its end.

    Args:
        every (`int`, *optional*):
            Write after every so many logs. At the end only if not given.
        html (`bool`, *optional*, defaults to `False`):
            Also write the page.

    Raises:
        ImportError: if matplotlib is not installed.
    """

    def __init__(self, every: int | None = None, html: bool = False) -> None:
        require_matplotlib()
        self.every = every
        self.names = ("report.png", "report.html") if html else ("report.png",)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write after every `every` logs of training."""
        if self.every and "loss" in (logs or {}) and sum("loss" in x for x in state.log_history) % self.every == 0:
            self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the finished run."""
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            try:
                for name in self.names:
                    plot_run(state.log_history, folder / name, title=folder.resolve().name)
            except (OSError, ValueError) as error:  # a full disk must not end the training
                logger.warning("no report: %s", error)


def main(arguments: list[str] | None = None) -> None:
    """Draw a run from its folder: the command `trl-lambda report`."""
    parser = argparse.ArgumentParser("trl-lambda report", description="Draw what a run has logged.")
    parser.add_argument("output_dir", help="output folder of a finished or running run; report.png is written there")
    parser.add_argument("--html", action="store_true", help="also write report.html, one self-contained page")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir)
    try:
        written = [plot_run(folder, folder / f"report.{ending}") for ending in ("png", "html")[: 1 + options.html]]
        lines = summarize_run(read_log_history(folder))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    lines += [("written", str(path)) for path in written]
    print("\n".join(f"{name:<34} {text}" for name, text in lines))
