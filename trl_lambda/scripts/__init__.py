"""`trl-lambda train`: TRL's GRPO script with the class swapped."""
