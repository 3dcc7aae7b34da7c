"""The parts of `recipes.bench.gpu`, each a list of steps that yield rows."""
