"""Offline playground: small verifiable tasks, a tiny base model that solves them part of the time, and rewards."""
