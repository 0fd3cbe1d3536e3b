"""The methods there are, by name. Light to import: a method's own module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from pahq.errors import PahqError, choices

if TYPE_CHECKING:
    from pahq.method.base import Problem, Scores, Work

RULES = ("top", "threshold", "greedy")
"""Ways from scores to a circuit, see ``method.select``."""


@dataclass(frozen=True)
class Method:
    """family: what it is akin to: ``sweep``, ``gradient``, ``measured``, ``trained``, ``flow`` or ``baseline``.

    natural: whether it sets a threshold of its own, so that neither a number of edges nor a threshold is needed;
    natural_option: the option that makes it do so where it is above 0; natural_unless: another option, and the value
    (its default) with which it does not. by_size: whether circuits of its scores go by their size unless told
    otherwise (first-order scores of edges that help are often below 0: signed ones leave no path).
    """

    name: str
    about: str
    family: str
    natural: bool = False
    natural_option: str = ""
    natural_unless: tuple[str, str] | None = None
    by_size: bool = False

    def sets_threshold(self, given: Mapping[str, Any]) -> bool:
        """Whether it sets a threshold with these options."""
        if self.natural_unless is not None:
            option, default = self.natural_unless
            if given.get(option, default) == default:
                return self.natural
        return self.natural or bool(given.get(self.natural_option))

    @property
    def natural_how(self) -> str:
        """The options with which it sets a threshold; empty if none makes it do so."""
        unless = "" if self.natural_unless is None else " and {} other than {}".format(*self.natural_unless)
        return f"{self.natural_option} above 0{unless}" if self.natural_option else ""

    @property
    def scores_edges(self) -> bool:
        """Whether it gives scores to choose edges by; ACDC decides on edges itself."""
        return self.family != "sweep"

    @property
    def _module(self) -> Any:
        return import_module(f"pahq.method.{self._stem}")

    @property
    def _stem(self) -> str:
        return self.name.replace("-", "_")

    @property
    def options_class(self) -> Any:
        """The dataclass of its options; None for ACDC, whose options are those of the run."""
        if not self.scores_edges:
            return None
        return getattr(self._module, "".join(word.capitalize() for word in self.name.split("-")) + "Options")

    def options(self, given: Mapping[str, Any]) -> Any:
        """Its options from names and values; raises PahqError for an unknown name or an impossible value."""
        cls = self.options_class
        hints = {} if cls is None else {f.name: get_type_hints(cls)[f.name] for f in fields(cls) if f.init}
        for name in given:
            if name not in hints:
                known = f"it has {', '.join(hints)}" if hints else "it has none"
                raise PahqError(f"method '{self.name}': option '{name}' is unknown; {known}")
        values = {name: _fitted(self.name, name, value, hints[name]) for name, value in given.items()}
        return None if cls is None else cls(**values)

    def scores(self, problem: Problem, options: Any, work: Work) -> Scores:
        """What the method's own function gives, see ``method.base``."""
        return getattr(self._module, f"{self._stem}_scores")(problem, options, work)


def _fitted(method: str, name: str, value: Any, hint: Any) -> Any:
    """``value`` in the type that the option is declared with; raises PahqError where it does not fit."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        origin = get_origin(kind) or kind
        if kind is NoneType and value in (None, "none") and str not in kinds:
            return None
        if origin is tuple and isinstance(value, str | list | tuple):
            return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and type(value) is origin:
            return value
        if not isinstance(origin, type) and isinstance(value, str):  # a choice of words: the options judge it
            return value
    wanted = " or ".join("none" if kind is NoneType else getattr(kind, "__name__", "one word") for kind in kinds)
    raise PahqError(f"method '{method}': option {name} is {value!r}; give a value of type {wanted}")


_ALL = (
    Method("acdc", "greedy removal of edges, one by one (Conmy et al. 2023)", "sweep"),
    Method("eap", "edge attribution patching: one gradient for all edges (Syed et al. 2023)", "gradient", by_size=True),
    Method("eap-ig", "the same with integrated gradients (Hanna et al. 2024)", "gradient", by_size=True),
    Method(
        "exact", "each edge removed alone from the full model: what attribution approximates", "measured", by_size=True
    ),
    Method("hisp", "importance of heads and MLPs by gradients, spread to edges (Michel et al. 2019)", "gradient"),
    Method("subnetwork-probing", "trained hard-concrete masks of nodes (Cao et al. 2021)", "trained", natural=True),
    Method("edge-pruning", "trained hard-concrete masks of edges (Bhaskar et al. 2024)", "trained", natural=True),
    Method(
        "information-flow",
        "shares of what a receiver reads, clean run alone (Ferrando & Voita 2024)",
        "flow",
        natural_option="tau",
        natural_unless=("combine", "flow"),
    ),
    Method("random", "random scores: the baseline", "baseline"),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
SCORING = tuple(name for name, method in METHODS.items() if method.scores_edges)


def get_method(name: str) -> Method:
    """The method of that name; raises PahqError if there is none."""
    if name not in METHODS:
        raise PahqError(f"method: '{name}' is unknown; {choices(name, METHODS)}")
    return METHODS[name]
