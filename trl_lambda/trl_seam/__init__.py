"""Where the weights enter TRL's own loss, the TRL internals this depends on, and the refusal of what bypasses it."""
