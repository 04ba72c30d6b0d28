"""R7 does not depend on how many blocks were read at once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from marketplace.deposits.booking import reach_minimum


@given(
    amounts=st.lists(st.integers(1, 7_000_000), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    minimum=st.integers(1, 6_000_000),
)
def test_any_split_into_ranges_credits_the_same(amounts: list[int], cuts: list[int], minimum: int) -> None:
    arrivals = {str(index): amount for index, amount in enumerate(amounts)}
    at_once = reach_minimum({}, arrivals, minimum)
    released: dict[str, int] = {}
    bounds = sorted({0, len(amounts), *(cut for cut in cuts if cut < len(amounts))})
    for start, end in pairwise(bounds):
        known = {key: arrivals[key] for key in list(arrivals)[:start] if key not in released}
        released |= reach_minimum(known, {key: arrivals[key] for key in list(arrivals)[start:end]}, minimum)
    assert released == at_once
    assert sum(amounts) - sum(released.values()) < minimum
