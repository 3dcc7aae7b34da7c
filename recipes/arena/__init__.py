"""Which aggregation learns better? Every arm on the same seeds, data, weights and budget; intervals over seeds."""
