"""
Which weighting learns better? Every arm on the same seeds, data, weights and budget; intervals over seeds.

`study`, `planned`, `preference_tuning` and `large` make rows; `analysis` reads them.
"""
