"""
The picture of the formulas: f over length for several λ, beside v over π.

    python docs/pictures.py    # writes docs/images/f_and_v.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from trl_lambda.weights import length_weights, probability_weights

IMAGES = Path(__file__).parent / "images"
LENGTHS = torch.tensor([[60, 120, 180, 240, 300, 360, 480, 600]])  # one group of eight responses, in tokens
LAMBDAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
DASHES = ((0, (1, 1)), (0, (3, 1.5)), "solid", (0, (3, 1.5)), (0, (1, 1)))
COLOURS = ("#2166ac", "#67a9cf", "0.25", "#ef8a62", "#b2182b")


def draw() -> Figure:
    """The two panels; colours carry nothing that labels at the curves do not."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = LENGTHS[0].tolist()
    named = {-1.0: "λ = -1: GRPO", 0.0: "λ = 0: DAPO"}
    for lam, dash, colour in zip(LAMBDAS, DASHES, COLOURS, strict=True):
        weights = length_weights(LENGTHS, lam, aggregation="power")[0].tolist()
        left.plot(lengths, weights, color=colour, linestyle=dash, marker="o", markersize=4)
        left.annotate(named.get(lam, f"λ = {lam:+g}"), (lengths[-1], weights[-1]), (8, 0), va="center",
                      textcoords="offset points", color=colour, fontsize=9)  # fmt: skip
    left.set(xlabel="response length |o| (tokens)", ylabel="f, weight of the response", yscale="log")
    left.set(xlim=(40, 800), xticks=lengths[::2] + [600])
    left.set_yticks((0.2, 0.5, 1, 2, 5), ("0.2", "0.5", "1", "2", "5"))
    left.minorticks_off()
    left.set_title("f: how much a response counts for its length (“power”)", loc="left", fontsize=10)

    probs = torch.linspace(0.002, 1, 500)
    styles = {"sigmoid": ("TR-GRPO", "solid", (0.5, 1.425)), "linear": ("AR, α = 0.2", (0, (3, 1.5)), (0.62, 0.87))}
    for regulation, (label, dash, where) in styles.items():
        weights = probability_weights(probs.log(), regulation=regulation).tolist()
        right.plot(probs.tolist(), weights, color="0.1", linestyle=dash)
        right.text(*where, label, fontsize=9)
    right.axhline(1, color="0.75", linewidth=0.8, zorder=0)
    right.set(
        xlabel="the policy's probability π of the token",
        ylabel="v, weight of the token",
        xlim=(0, 1),
        ylim=(0.75, 1.5),
    )
    right.set_title("v: how much a token counts for its probability", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw().savefig(args.out / "f_and_v.png", dpi=130)


if __name__ == "__main__":
    main()
