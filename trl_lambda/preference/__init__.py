"""λ: its value, its parameter group, its step, and its state on disk."""
