"""Two lanes share no file, and together are the plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from converter.lanes import alternately, cut, in_lanes

things = st.lists(
    st.tuples(st.integers(1, 9), st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3)), min_size=1, max_size=9
)


@given(things)
def test_a_cut_divides_the_files_as_near_to_half_as_can_be(items):
    sizes, touched = [size for size, _ in items], [files for _, files in items]

    def apart(position):
        return not set().union(*touched[:position]) & set().union(*touched[position:])

    cuts = [position for position in range(1, len(items)) if apart(position)]
    chosen = cut(sizes, touched)
    assert (chosen in cuts) if cuts else (chosen is None)
    if cuts:
        distance = {position: abs(sum(sizes[:position]) - sum(sizes) / 2) for position in cuts}
        assert distance[chosen] == min(distance.values())


@given(st.lists(st.integers()), st.lists(st.integers()))
def test_alternating_keeps_both_orders_and_loses_nothing(first, second):
    mixed = list(alternately(((0, x) for x in first), ((1, x) for x in second)))
    assert [x for lane, x in mixed if lane == 0] == first
    assert [x for lane, x in mixed if lane == 1] == second


def test_lanes_take_turns():
    assert list(in_lanes(lambda: range(6), lambda number: number < 2)) == [0, 2, 1, 3, 4, 5]
