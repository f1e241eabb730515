"""The weights of all scenes of a library, in memory, and the scenes nearest to given weights."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from latentscenes.core.errors import UserError
from latentscenes.core.names import short
from latentscenes.model.planes import Metric, weight_distances


class Neighbor(NamedTuple):
    """A similar scene."""

    name: str
    distance: float
    """At least 0; 0 for equal weights."""


class WeightTable:
    """Names of n scenes and their weights over M base planes."""

    def __init__(self, names: Sequence[str], table: Float[Tensor, "n M"]):
        self.names, self.table = names, table

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def of(self, names: Sequence[str]) -> Float[Tensor, "k M"]:
        """Returns the weights of k scenes."""
        return self.table[[self._row(name) for name in names]]

    def _row(self, name: str) -> int:
        if name not in self._rows:
            raise UserError(
                f"scene {short(name)}: not among the names of all scenes. If the library changed just now, "
                "try again; else `latentscenes library verify` lists the damage."
            )
        return self._rows[name]

    def nearest(
        self, to: str | Float[Tensor, "k"], count: int, products: Float[Tensor, "M M"], metric: Metric
    ) -> list[Neighbor]:
        """Returns the `count` scenes nearest to a scene, which is left out, or to weights; nearest first.
        `products` and `metric`: see `weight_distances`. Raises a UserError if there are other than M weights.
        """
        own = self._row(to) if isinstance(to, str) else None
        wanted = to if own is None else self.table[own]
        if wanted.shape != self.table.shape[1:]:
            raise UserError(
                f"nearest: {tuple(wanted.shape)} weights given, "
                f"but this library has {self.table.shape[1]} base planes."
            )
        distance = weight_distances(self.table, wanted, products, metric)
        order = distance.argsort(stable=True)[: count + 1].tolist()
        return [Neighbor(self.names[row], float(distance[row])) for row in order if row != own][:count]
