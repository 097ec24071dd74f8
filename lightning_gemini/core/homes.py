"""Which chunks have their home on the device: a search over sets of chunks, whatever they are judged by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

#: By chunk, whether its home is the device.
Homes = tuple[bool, ...]

#: What homes cost, the most important first; less is better.
Rating = tuple[int, ...]

#: Up to so many chunks every number of homes is tried, and each chunk the other way in the end.
FEW_CHUNKS = 24

#: Beyond: points of the grid that is laid again and again around the best, and chunks tried in the end.
_GRID, _TRIED = 9, 8

#: How many homes are handed back.
_FINALISTS = 3


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
    narrows around the best. Then single chunks are moved to the other side while that is better.

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
    others = [c for c in orders[0] if not best[c]] + [c for c in reversed(orders[0]) if best[c]]
    for chunk in others if len(others) <= FEW_CHUNKS else others[:_TRIED]:
        flipped = _flip(best, chunk)
        if fits(flipped) and allowed(flipped) and cost(flipped) < cost(best):
            best = flipped
    return sorted(rated, key=cost)[:_FINALISTS]


_WORST: Rating = (2**200,)


def _narrow(steps: Sequence[Homes], cost: Callable[[Homes], Rating], grid: int) -> None:
    """Rates points of a grid over ``steps`` and then around the best of them, until there is nothing in between."""
    low, high = 0, len(steps) - 1
    while True:
        points = sorted({low + (high - low) * k // max(grid - 1, 1) for k in range(grid)})
        best = min(range(len(points)), key=lambda k: cost(steps[points[k]]))
        if high - low < grid:
            return
        low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]


def _flip(homes: Homes, chunk: int) -> Homes:
    return (*homes[:chunk], not homes[chunk], *homes[chunk + 1 :])
