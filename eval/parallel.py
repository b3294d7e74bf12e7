"""Work shared by the processes of a run, with the same result for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from blip import dist
from blip.errors import DataError
from blip.train.log import bar

Part = TypeVar("Part")
Result = TypeVar("Result")


def spread(parts: Sequence[Part], work: Callable[[Part], list[Result]], *, what: str = "") -> list[Result]:
    """What `work` finds for each part, one list after the other; all processes have to call it, and each returns all.

    Who does a part depends on the number of processes, what is done together does not, so neither do the results. A
    DataError or ValueError in one process is raised in all of them.
    """
    mine = range(dist.rank(), len(parts), dist.world())
    found: dict[int, list[Result]] = {}
    failure = None
    try:
        with bar(len(mine), what, "parts", show=dist.is_main()) as told:
            for number in mine:
                found[number] = work(parts[number])
                told.update()
    except (DataError, ValueError) as error:  # the others wait in `gather_objects`, so they have to be told
        failure = error
    gathered = dist.gather_objects((found, failure))
    for _, failure in gathered:
        if failure:
            raise failure
    whole = {number: results for found, _ in gathered for number, results in found.items()}
    assert len(whole) == len(parts) == sum(len(found) for found, _ in gathered), "a part was done twice or not at all"
    return [result for number in range(len(parts)) for result in whole[number]]
