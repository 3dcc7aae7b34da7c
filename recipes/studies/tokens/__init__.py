"""The same accuracy for fewer tokens? `length_target` and other ways of saving tokens."""
