"""A progress bar that says what a person watches."""

from typing import Any

from transformers import ProgressCallback


class ShortProgress(ProgressCallback):
    """The progress bar with a few figures beside it, instead of a line of all metrics at each logged step."""

    FIGURES = {
        "reward": "reward",
        "completions/mean_length": "length",
        "lambda/value": "lambda",
        "eval_reward": "held-out reward",
    }

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Update the figures that this log holds; the others stay as they were."""
        if state.is_world_process_zero and self.training_bar is not None:
            logged = {label: (logs or {}).get(key) for key, label in self.FIGURES.items()}
            self.shown |= {label: f"{value:.3f}" for label, value in logged.items() if value is not None}
            self.training_bar.set_postfix(self.shown)
