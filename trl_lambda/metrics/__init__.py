"""What the loss does, as numbers, logged through TRL."""
