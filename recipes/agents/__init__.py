"""Tools and environments of the recipes, and the checks and guards that `recipes/train.py` puts around any."""
