"""Prefix groups: the paper's examples, and the best that any grouping could save."""

from collections.abc import Iterator
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policies.support.prefix_tree import Group, prefix_groups


def processed(paths: list[str], groups: list[Group]) -> int:
    """Elements to compute where each group computes its prefix once."""
    return sum(map(len, paths)) - sum((len(group.members) - 1) * group.depth for group in groups)


def bound(paths: list[str]) -> int:
    """Elements to compute where every level is shared: the nodes of the tree."""
    return len({path[:end] for path in paths for end in range(1, len(path) + 1)})


def in_common(paths: list[str]) -> int:
    """Letters with which all begin."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*paths, strict=False)))


def names(paths: list[str], groups: list[Group]) -> set[frozenset[str]]:
    return {frozenset(paths[place] for place in group.members) for group in groups}


def test_of_abx_aby_acz_one_level_processes_7_of_9_and_the_full_tree_6():
    paths = ["ABx", "ABy", "ACz"]
    assert sum(map(len, paths)) == 9
    assert processed(paths, prefix_groups(paths)) == 7
    assert bound(paths) == 6


def test_with_abw_the_longer_prefix_is_shared_by_three_and_not_the_shorter_one_by_four():
    paths = ["ABx", "ABy", "ACz", "ABw"]
    groups = prefix_groups(paths)
    assert names(paths, groups) == {frozenset(["ABx", "ABy", "ABw"]), frozenset(["ACz"])}
    assert processed(paths, groups) == 8
    assert processed(paths, [Group(1, [0, 1, 2, 3])]) == 9, "A first"


def test_a_shorter_prefix_wins_where_enough_have_it_in_common():
    paths = ["ABx", "ABy", "ACz", "ADz", "AEz"]
    groups = prefix_groups(paths)
    assert names(paths, groups) == {frozenset(paths)}
    assert processed(paths, groups) == 11


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        ([], []),
        ([""], [Group(0, [0])]),
        (["", ""], [Group(0, [0]), Group(0, [1])]),
        (["AB", "AB", "AB"], [Group(2, [0, 1, 2])]),
        (["A", "AB", "ABC", "ABC"], [Group(2, [1, 2, 3])]),
        (["x", "y"], [Group(0, [0]), Group(0, [1])]),
    ],
    ids=["none", "empty", "two empty", "equal", "each the next one's prefix", "nothing in common"],
)
def test_the_smallest_cases(paths: list[str], groups: list[Group]):
    found = prefix_groups(paths)
    assert [group for group in found if group in groups] == groups
    assert sorted(place for group in found for place in group.members) == list(range(len(paths)))


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    if not places:
        yield []
        return
    first, *rest = places
    for others in partitions(rest):
        yield [[first], *others]
        for i, part in enumerate(others):
            yield [*others[:i], [first, *part], *others[i + 1 :]]


@given(st.lists(st.text("AB", max_size=6), min_size=1, max_size=6))
def test_no_grouping_saves_more(paths: list[str]):
    found = prefix_groups(paths)
    assert sorted(place for group in found for place in group.members) == list(range(len(paths)))
    for group in found:
        assert in_common([paths[place] for place in group.members]) >= group.depth
    best = min(
        processed(paths, [Group(in_common([paths[place] for place in part]), part) for part in parts])
        for parts in partitions(list(range(len(paths))))
    )
    assert processed(paths, found) == best
    assert best >= bound(paths)
