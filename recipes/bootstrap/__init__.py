"""The bootstrapping experiment: a model's captioner and filter clean the training data of the next model."""

from recipes.bootstrap.run import main

__all__ = ["main"]
