"""Which chunks have their home on the device: a search over sets of chunks, whatever they are judged by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import product

#: By chunk, whether its home is the device.
Homes = tuple[bool, ...]

#: What homes cost, the most important first; less is better.
Rating = tuple[int, ...]

#: Up to so many chunks every number of homes is tried, and each chunk the other way in the end.
FEW_CHUNKS = 24

#: Up to so many, each pair of chunks on different sides, too.
_SWAPPED_CHUNKS = 12

#: Beyond :data:`FEW_CHUNKS`: points of the grid that is laid again and again around the best; chunks tried in the end.
_GRID, _TRIED = 9, 8

#: How many homes are handed back.
_FINALISTS = 3

#: Of what is not wanted.
_WORST: Rating = (2**200,)


def nested_homes(order: Sequence[int], fits: Callable[[Homes], bool]) -> list[Homes]:
    """No home on the device, then one, two, ... along ``order``, as long as they fit; each contains the one before.

    Args:
        order: chunks, those first that are worth the most on the device.
        fits: whether the device can hold such homes; what fits must fit with fewer of them, too.
    """
    count = len(order)

    def first(number: int) -> Homes:
        chosen = set(order[:number])
        return tuple(chunk in chosen for chunk in range(count))

    number = bisect_left(range(1, count + 1), True, key=lambda number: not fits(first(number)))
    found = [first(k) for k in range(number + 1)]
    for chunk in order[number + 1 : number + 1 + _TRIED]:  # smaller ones may still fit
        more = _flip(found[-1], chunk)
        if fits(more):
            found.append(more)
    return found


def search_homes(
    orders: Sequence[Sequence[int]],
    fits: Callable[[Homes], bool],
    allowed: Callable[[Homes], bool],
    rate: Callable[[Homes], Rating | None],
) -> list[Homes]:
    """The best homes that were found, the best first; empty if none is possible.

    Along each order every number of homes is rated if there are few chunks; if there are many, those on a grid that
    narrows around the best. Then single chunks are moved to the other side where that is better, and where there are
    very few, pairs change places.

    Args:
        orders: opinions about which chunks are worth the most on the device; each a permutation of all.
        fits: whether the device can hold such homes; what fits must fit with fewer of them, too.
        allowed: whether such homes are possible otherwise, as far as that is known at once.
        rate: what they cost; ``None`` if they are not wanted.
    """
    rated: dict[Homes, Rating] = {}

    def cost(homes: Homes) -> Rating:
        if homes not in rated and (rating := rate(homes)) is not None:
            rated[homes] = rating
        return rated.get(homes, _WORST)

    for order in orders:
        steps = [homes for homes in nested_homes(order, fits) if allowed(homes)]
        if steps:
            _narrow(steps, cost, len(steps) if len(order) <= FEW_CHUNKS else _GRID)
    if not rated:
        return []
    best = min(rated, key=cost)
    hosted, settled = [c for c in orders[0] if not best[c]], [c for c in reversed(orders[0]) if best[c]]
    moves: list[tuple[int, ...]] = [(chunk,) for chunk in (*hosted, *settled)]
    if len(moves) > FEW_CHUNKS:
        moves = moves[:_TRIED]
    elif len(moves) <= _SWAPPED_CHUNKS:
        moves += product(hosted, settled)
    for move in moves:
        other = _flip(best, *move)
        if fits(other) and allowed(other) and cost(other) < cost(best):
            best = other
    return sorted(rated, key=cost)[:_FINALISTS]


def _narrow(steps: Sequence[Homes], cost: Callable[[Homes], Rating], grid: int) -> None:
    """Rates points of a grid over ``steps`` and then around the best of them, until there is nothing in between."""
    low, high = 0, len(steps) - 1
    while True:
        points = sorted({low + (high - low) * k // max(grid - 1, 1) for k in range(grid)})
        best = min(range(len(points)), key=lambda k: cost(steps[points[k]]))
        if high - low < grid:
            return
        low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]


def _flip(homes: Homes, *chunks: int) -> Homes:
    return tuple(home != (index in chunks) for index, home in enumerate(homes))
