"""
A run as a picture (PNG), a page (HTML) and a few lines of text. matplotlib is an extra: `pip install
"trl-lambda[plots]"`.

    trl-lambda report OUTPUT_DIR --html
"""

from .folder import read_log_history
from .history import summarize_run
from .run_report import ReportCallback, main, plot_run, require_matplotlib
from .token_heatmap import heatmap

__all__ = ["ReportCallback", "heatmap", "main", "plot_run", "read_log_history", "require_matplotlib", "summarize_run"]
