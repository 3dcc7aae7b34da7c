"""What the weights cost, measured."""
