"""Recipes: a training script, its YAML files, and an offline playground to run them on."""
