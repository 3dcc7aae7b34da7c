"""The report of a run: the picture, the page around it, the callback that writes both, the command."""

import argparse
import base64
import html
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .folder import read_run
from .history import (
    LogHistory,
    RunLog,
    check_history,
    evaluations,
    lambda_change,
    readable,
    readable_history,
    series,
    summarize_run,
)
from .legend import legend_height
from .names import PAGES, PICTURES, check_ending
from .panels import PANELS, finish_panel

logger = logging.getLogger(__name__)

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 1.5em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse }} td, th {{ text-align: left; padding: .1em 1.2em .1em 0 }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
</style></head><body>
<h1>{title}</h1>
<table>{summary}</table>
<p><img alt="Panels of the run: {panels}" src="data:image/png;base64,{png}"></p>
<details><summary>Last logged value of every metric</summary>
<table><tr><th>metric</th><th>value</th><th>step</th></tr>{metrics}</table></details>
</body></html>
"""


def require_matplotlib() -> None:
    """
    Check that pictures can be drawn.

    Raises:
        ImportError: if matplotlib cannot be imported, with the extra to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "trl-lambda[plots]"') from error


def plot_run(
    run: LogHistory | str | Path,
    path: str | Path,
    *,
    title: str | None = None,
    aggregation: str | None = None,
    length_scale: float = 1 / 9,
) -> Path:
    """
    Draw what a run logged: reward, λ, where the loss went by length and by probability, entropy, length.

    Args:
        run (`list[dict]`, `str` or `Path`):
            A log history, such as `trainer.state.log_history`, or the output folder of a run, which may still be
            going on. A panel is left out where the run has nothing for it.
        path (`str` or `Path`):
            File to write: a PNG if it ends in `.png`, one self-contained page if in `.html` or `.htm`. Its folder is
            made if need be.
        title (`str`, *optional*):
            What names the run above the panels; the folder's name and its `aggregation` if not given.
        aggregation (`str`, *optional*):
            `"lambda"` or `"power"`: which f the panel of f over length shows. Read from the folder's `lambda.json` if
            not given; without either that panel is left out.
        length_scale (`float`, *optional*, defaults to `1/9`):
            r of `"lambda"`, where `aggregation` is given.

    Returns:
        `Path`: the file written.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if `run` holds no log history, one without any of the metrics, or several runs, the file name ends
            in neither, or `length_scale` is not in (0, 1).
    """
    path = check_ending("path", path, PICTURES + PAGES)
    if not 0 < length_scale < 1:
        raise ValueError(f"length_scale={length_scale} must be in (0, 1): no group has a larger one.")
    require_matplotlib()
    log = read_run(run) if isinstance(run, (str, Path)) else RunLog(run)
    if title is not None:
        log = replace(log, title=title)
    if aggregation is not None:
        log = replace(log, aggregation=aggregation, length_scale=length_scale)
    return _write_report(log, [path])[0]


def _write_report(log: RunLog, paths: list[Path]) -> list[Path]:
    """Draw once and write each of `paths`, a page where the name says so, else the picture."""
    check_history(log.history)
    log = replace(log, history=readable_history(log.history), title=readable(log.title))
    png = _draw(log)
    for path in paths:
        _write(path, _page(log, png) if path.suffix.lower() in PAGES else png)
    return paths


def _draw(log: RunLog) -> bytes:
    """
    Draw the panels that have data and return the PNG.

    Raises:
        ValueError: if none has.
    """
    # The Agg canvas directly: pyplot would change the caller's backend and keep the figure alive.
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    panels = [panel for panel in PANELS if panel.has_data(log)]
    if not panels:
        if not log.history:
            raise ValueError(
                "run has logged nothing yet: a checkpoint holds what was logged before it (logging_steps)."
            )
        keys = ", ".join(dict.fromkeys(key for panel in PANELS for key in panel.needs))
        raise ValueError(f"run has {len(log.history)} entries and nothing to draw; needed is at least one of: {keys}.")
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(4.9 * columns + 0.3, 2.75 * rows + 0.4), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    taller = [0.0] * rows  # inches that a row of panels needs for legends of several lines
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        finish_panel(axes, panel, log)
        taller[number // columns] = max(taller[number // columns], legend_height(axes))
        if panel.over_steps:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if any(taller):
        figure.set_figheight(figure.get_figheight() + sum(taller))
        grid.set_height_ratios([2.75 + inches for inches in taller])
    if log.title:
        figure.suptitle(log.title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _page(log: RunLog, png: bytes) -> bytes:
    """Return the page: the summary, the picture inside it, and the last value of every metric."""
    picture = base64.b64encode(png).decode("ascii")
    summary = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in summarize_run(log.history)
    )
    metrics = "".join(
        f'<tr><td>{html.escape(key)}</td><td class="number">{values[-1]:.6g}</td>'
        f'<td class="number">{steps[-1]}</td></tr>'
        for key, (steps, values) in sorted(_all_series(log.history).items())
        if values and key != "step"
    )
    panels = ", ".join(panel.title for panel in PANELS if panel.has_data(log))
    title = html.escape(log.title or "Run")
    page = _PAGE.format(title=title, summary=summary, panels=html.escape(panels), png=picture, metrics=metrics)
    return page.encode("utf-8")


def _all_series(history: LogHistory) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of every metric, those of several held-out data sets apart: `eval_NAME_reward`."""
    sets = evaluations(history)
    named = {key for entries in sets.values() for entry in entries for key in entry} if any(sets) else set()
    keys = {key for entry in history for key in entry if not (any(sets) and key.startswith("eval_"))}
    found = {key: series(history, key) for key in keys}
    for name, entries in sets.items():
        for key in (key for key in named if key.startswith("eval_")):
            shown = f"eval_{name}_{key.removeprefix('eval_')}" if name else key
            found[shown] = series(entries, key)
    return found


def _write(path: Path, content: bytes) -> None:
    """Write by way of a temporary file: whoever looks while a run goes on sees the whole old or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class ReportCallback(TrainerCallback):
    """
    Write the picture of the run while it goes on: `report.png`, and on request `report.html`, in `output_dir`.

    A picture that cannot be written is warned about once; training goes on.

    Args:
        every (`int`, *optional*):
            Write after every so many logs of training, besides the end. Only at the end if not given.
        html (`bool`, *optional*, defaults to `False`):
            Also write one self-contained page.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if `every` is below 1.
    """

    def __init__(self, every: int | None = None, html: bool = False) -> None:
        require_matplotlib()
        if every is not None and every < 1:
            raise ValueError(f"every={every} must be >= 1, or None for the end only.")
        self.every = every
        self.names = ("report.png", "report.html") if html else ("report.png",)
        self._logs = 0
        self._warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Count logs of training and write after every `every` of them."""
        if self.every is None or "loss" not in (logs or {}):
            return
        self._logs += 1
        if self._logs % self.every == 0:
            self._write_all(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the finished run."""
        self._write_all(args, state)

    def _write_all(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        options = {name: getattr(args, name, None) for name in ("aggregation", "token_regulation")}
        title = f"{folder.resolve().name}: " + ", ".join(f"{option}={value}" for option, value in options.items())
        side = getattr(args, "lambda_side", "both")
        side = "positive" if side == "both" and getattr(args, "length_target", None) is not None else side
        log = RunLog(state.log_history, title, options["aggregation"], getattr(args, "length_scale", 1 / 9), side)
        try:
            _write_report(log, [folder / name for name in self.names])
        except (OSError, ValueError) as error:
            if not self._warned:
                logger.warning("no report: %s", " ".join(str(error).split()))
            self._warned = True


def main(arguments: list[str] | None = None) -> None:
    """Write the report of a run from its folder; what the user can mend is told in one line, without a traceback."""
    parser = argparse.ArgumentParser(
        prog="trl-lambda report", description="Draw a finished or running run from its output folder."
    )
    parser.add_argument("output_dir", help="the run's output_dir, with trainer_state.json, checkpoints or event files")
    parser.add_argument("--png", help="picture to write, .png (default: OUTPUT_DIR/report.png)")
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        help="also write one self-contained page, .html or .htm (default: OUTPUT_DIR/report.html)",
    )
    parser.add_argument("--title", help="what names the run (default: the folder's name)")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir)
    try:
        paths = [check_ending("--png", options.png or folder / "report.png", PICTURES)]
        if options.html is not None:
            paths.append(check_ending("--html", options.html or folder / "report.html", PAGES))
        if not folder.is_dir():
            raise ValueError(f"{options.output_dir!r} is no folder; accepted: the output_dir of a run.")
        require_matplotlib()
        log = read_run(folder)
        written = _write_report(log if options.title is None else replace(log, title=options.title), paths)
        lines = summarize_run(log.history) + lambda_change(log.history)
    except (ValueError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    lines += [("written", readable(str(path))) for path in written]
    print("\n".join(f"{name:<34} {text}" for name, text in lines))
