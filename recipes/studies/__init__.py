"""The studies: what the weights do to learning, tokens and cost. Nothing that a user launches imports them."""
