"""Where the weights enter TRL's own loss, what that relies on, and what would bypass it."""
