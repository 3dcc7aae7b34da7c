"""
A run as a picture (PNG), as a page (HTML) and as a few lines of text; one completion as a heat map of its tokens.
Pictures need matplotlib: `pip install "trl-lambda[plots]"`.

    trl-lambda report OUTPUT_DIR --html
"""

from .history import read_log_history, summarize_run
from .pages import require_matplotlib
from .run_report import ReportCallback, main, plot_run
from .token_heatmap import heatmap

__all__ = ["ReportCallback", "heatmap", "main", "plot_run", "read_log_history", "require_matplotlib", "summarize_run"]
