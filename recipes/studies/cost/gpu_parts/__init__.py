"""The parts of `recipes.studies.cost.gpu`, each a list of steps that yield rows."""
