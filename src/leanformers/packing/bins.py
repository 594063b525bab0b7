"""Bin packing: prompts of different lengths into as few rows as may be."""

from __future__ import annotations

from collections.abc import Sequence

from leanformers.errors import LeanError


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the items, bin by bin: the longest item first, each into the first bin that has room for it.

    At most 11/9 of the fewest possible bins and 2/3 of one more (Dósa, 2007), in O(items x bins). Items of length 0
    take no room and are left out. Ties keep the order of arrival, and each bin lists its items in it.

    Raises:
        LeanError: an item that no bin can hold.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise LeanError(f"An item of length {longest} does not fit into a bin of {capacity}: give a larger capacity.")
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        length = lengths[place]
        found = next((index for index, left in enumerate(room) if left >= length), None)
        if found is None:
            bins.append([place])
            room.append(capacity - length)
        else:
            bins[found].append(place)
            room[found] -= length
    return [sorted(held) for held in bins]
