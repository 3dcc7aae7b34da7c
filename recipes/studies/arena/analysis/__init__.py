"""What the rows of `results/runs.csv` say: comparisons of arms, their statistics, tables and figures."""
