"""Which weights point along the policy gradient: batches, weights, cosines, the study and its summary."""
