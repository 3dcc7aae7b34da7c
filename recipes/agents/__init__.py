"""Tools and environments: what `recipes/train.py` takes by dotted path, and those of the recipes."""
