"""
The picture of the formulas: f over length for several λ, and v over π.

    python docs/pictures.py    # writes docs/images/f_and_v.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_lambda.weights import length_weights, token_weights

IMAGES = Path(__file__).parent / "images"
LENGTHS = torch.tensor([[60, 120, 180, 240, 300, 360, 480, 600]])  # one group of eight responses, in tokens
# Each family's λ, with names for two of them.
FAMILIES = {
    "power": {-1.0: "λ = -1: GRPO", -0.5: "λ = -0.5", 0.0: "λ = 0: DAPO", 0.5: "λ = 0.5", 1.0: "λ = 1"},
    "lambda_grpo": {-4.0: "λ = -4", -2.0: "λ = -2", 0.0: "λ = 0: DAPO", 2.0: "λ = 2", 4.0: "λ = 4"},
}
DASHES = ((0, (1, 1)), (0, (3, 1.5)), "solid", (0, (3, 1.5)), (0, (1, 1)))
COLOURS = ("#2166ac", "#67a9cf", "0.25", "#ef8a62", "#b2182b")
TOKEN_WEIGHTS = {"tr_grpo": ("TR-GRPO", "solid", (0.5, 1.425)), "ar": ("AR, α = 0.2", (0, (3, 1.5)), (0.62, 0.87))}


def draw() -> Figure:
    """Three panels in a column, legible on a phone. Labels at the curves say all that colours say."""
    figure = Figure(figsize=(5.6, 9.6), layout="constrained")
    panels = figure.subplots(3, 1)
    for axes, (family, names) in zip(panels, FAMILIES.items(), strict=False):
        draw_length_weight(axes, family, names)
    draw_token_weight(panels[2])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
    return figure


def draw_length_weight(axes: Axes, family: str, names: dict[float, str]) -> None:
    """f over length, a curve per λ."""
    lengths = LENGTHS[0].tolist()
    for (lam, label), dash, colour in zip(names.items(), DASHES, COLOURS, strict=True):
        weights = length_weights(LENGTHS, lam, length_weight=family)[0].tolist()
        axes.plot(lengths, weights, color=colour, linestyle=dash, marker="o", markersize=4)
        axes.annotate(label, (lengths[-1], weights[-1]), (8, 0), va="center", textcoords="offset points", color=colour,
                      fontsize=9)  # fmt: skip
    axes.set(xlabel="response length |o| (tokens)", ylabel="f, weight of the response", yscale="log")
    axes.set(xlim=(40, 800), xticks=[60, 180, 300, 480, 600], ylim=(0.13, 6))
    axes.set_yticks((0.2, 0.5, 1, 2, 5), ("0.2", "0.5", "1", "2", "5"))
    axes.minorticks_off()
    axes.set_title(f"length weight “{family}”", loc="left", fontsize=12)


def draw_token_weight(axes: Axes) -> None:
    """v over the token's probability, a curve per member."""
    probs = torch.linspace(0.002, 1, 500)
    for name, (label, dash, where) in TOKEN_WEIGHTS.items():
        axes.plot(probs.tolist(), token_weights(probs.log(), token_weight=name).tolist(), color="0.1", linestyle=dash)
        axes.text(*where, label)
    axes.axhline(1, color="0.75", linewidth=0.8, zorder=0)
    axes.set(xlabel="the policy's probability π of the token", ylabel="v, weight of the token")
    axes.set(xlim=(0, 1), ylim=(0.75, 1.5))
    axes.set_title("token weights", loc="left", fontsize=12)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw().savefig(args.out / "f_and_v.png", dpi=130)


if __name__ == "__main__":
    main()
