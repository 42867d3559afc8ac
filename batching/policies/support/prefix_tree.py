"""Which requests to run together for the prefix that they share: the prefix tree of many prompts, flattened to one level.

After BatchLLM (Zheng et al. 2024, arXiv 2412.03594), which lets a request share one prefix only, so that the choice is between
a long prefix that few have in common and a short one that many have. The tree is compact: a node is where prompts part. Works
on sequences of anything that can be compared, letters or the keys of KV blocks, and knows neither requests nor a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, takewhile
from typing import Any, NamedTuple

Path = Sequence[Any]


class Group(NamedTuple):
    """`members`: places of the prompts that share their first `depth` elements; a group of one shares nothing."""

    depth: int
    members: list[int]


@dataclass(eq=False)
class Node:
    """Where prompts part: `depth` elements from the root. `ends`: those with nothing more in common with any other."""

    depth: int
    ends: list[int] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)


def prefix_groups(paths: Sequence[Path]) -> list[Group]:
    """Each prompt in one group, such that the groups save the most: (members - 1) * depth each. Exact, by dynamic programming
    over the tree (the paper's own rule, from a node to its grandchildren, is a heuristic)."""
    order = sorted(range(len(paths)), key=lambda place: tuple(paths[place]))
    root = Node(0, children=[_tree(paths, order)] if order else [])

    @cache
    def saves(node: Node, outer: int) -> int:
        """The most that the prompts below `node` can save, where joining a group further up saves `outer` each."""
        return max(apart(node), joined(node, outer))

    def joined(node: Node, outer: int) -> int:
        return outer * len(node.ends) + sum(saves(child, outer) for child in node.children)

    def apart(node: Node) -> int:
        """A group at `node`: its first member computes the prefix."""
        return joined(node, node.depth) - node.depth

    def collect(node: Node, outer: Group | None) -> None:
        if apart(node) > joined(node, outer.depth if outer else 0):
            outer = Group(node.depth, [])
            groups.append(outer)
        if outer:
            outer.members.extend(node.ends)
        else:
            groups.extend(Group(0, [place]) for place in node.ends)
        for child in node.children:
            collect(child, outer)

    groups: list[Group] = []
    collect(root, None)
    return groups


def _tree(paths: Sequence[Path], order: list[int]) -> Node:
    """Of the prompts in `order`, which is sorted: what the first and the last have in common, all have."""
    first, last = paths[order[0]], paths[order[-1]]
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    node = Node(depth)
    for following, places in groupby(order, key=lambda place: paths[place][depth : depth + 1]):
        below = list(places)
        if len(below) == 1 or not following:
            node.ends += below
        else:
            node.children.append(_tree(paths, below))
    return node
