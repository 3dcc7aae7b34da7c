"""`recipes/bench/metrics_cost.py`: the metrics really are on and off, and cost a small part of a step."""

from recipes.bench.metrics_cost import measure


def test_the_cost_of_the_metrics_is_small():
    result = measure(pairs=6)
    assert 0 < result["loss without"] < result["step"]
    # The bound is 1 %; on a machine that other work keeps busy a pair scatters by several.
    assert result["part of a step"] < 0.1
