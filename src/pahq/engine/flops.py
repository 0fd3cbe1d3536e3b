"""Counting the arithmetic of matrix products by component, and how much of one is held at a time."""

from __future__ import annotations

CHUNK_ELEMENTS = 1 << 18
"""Elements of a product worked on at a time: few enough that the passes after it find them in the cache."""

KEPT = "differences"
"""Component of products that are done once and kept."""


class Flops:
    """Floating-point operations (two for each multiply-add) of the products done so far, by component."""

    def __init__(self) -> None:
        self.by_component: dict[str, int] = {}

    def add(self, component: str, multiply_adds: int) -> None:
        self.by_component[component] = self.by_component.get(component, 0) + 2 * multiply_adds

    @property
    def recurring(self) -> int:
        """All but what is done once and kept, which a resumed run does at another time."""
        return sum(count for component, count in self.by_component.items() if component != KEPT)
