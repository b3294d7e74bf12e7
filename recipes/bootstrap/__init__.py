"""The bootstrap: a captioner and a filter clean the data of their successor."""

from recipes.bootstrap.run import main

__all__ = ["main"]
