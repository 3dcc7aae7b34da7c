"""
Which aggregation learns better? Every arm on the same seeds, data, weights and budget; intervals over seeds.

Rows flow one way: `comparison` makes `results/runs.csv`, and `analysis` reads it. `alignment` measures the gradients
of the same arms' weights. `large` is the comparison with a larger model.
"""
