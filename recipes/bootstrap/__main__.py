"""Entry point of `python -m recipes.bootstrap`."""

from recipes import command
from recipes.bootstrap.run import main

if __name__ == "__main__":
    command.run(main)
