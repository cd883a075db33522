"""What `compare` is asked for: one value that travels whole from the flag to the task."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from specbasis.core.errors import InputError

if TYPE_CHECKING:
    from specbasis.architecture.key import MatrixKey
    from specbasis.architecture.pair import MatrixPair
    from specbasis.checkpoint import Checkpoint
    from specbasis.measures.measure import Measure
    from specbasis.measures.own import OwnMeasure


@dataclass(frozen=True)
class Options:
    """What to compare, and how far down the spectrum.

    Attributes:
        ranks: leading ranks whose singular vectors are compared; singular values are compared at all ranks.
        subspace: number of leading ranks k at which principal angles are taken.
        roles: keep matrices with these roles (a prefix such as "attention" counts), or all.
        blocks: keep matrices of these blocks, or all.
        name: keep matrices whose name matches this pattern (``*`` and ``?``), or all.
        common_rows: compare the rows that both sides have where a vocabulary grew.
        measures: patterns of the measures to take, or all.
        approximate: short sides over `LARGE` by block Krylov iteration, where the ranks are few.
        cached: base and tuned are decomposed through a cache, with the vectors of both sides (other rounding).
        nulls: what an update of the same size without a direction would leave, beside every alignment.
        null_samples: random updates of each kind that are decomposed as well.
        heads: number of attention heads, where the model does not say it.
        own: a user's own measures.
    """

    ranks: int = 200
    subspace: int = 10
    roles: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    name: str = ""
    common_rows: bool = False
    measures: tuple[str, ...] = ()
    cached: bool = False
    approximate: bool = False
    nulls: bool = False
    null_samples: int = 0
    heads: int | None = None
    own: tuple[OwnMeasure, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # What is computed once in each process stays there: a table of functions cannot travel.
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @cached_property
    def table(self) -> tuple[Measure, ...]:
        """Every measure that there is under these options."""
        from specbasis.measures.table import table

        return table(null=self.nulls, sampled=self.null_samples > 0, owned=self.own)

    @cached_property
    def taken(self) -> tuple[Measure, ...]:
        """The measures that are taken: those that match the patterns, and the user's own."""
        from specbasis.measures.own import OWN
        from specbasis.measures.table import choose

        chosen = choose(self.measures, whole=not self.approximate, measures=self.table)
        return tuple(m for m in self.table if m in chosen or m.source == OWN)

    def __post_init__(self) -> None:
        from specbasis.architecture.key import ROLES
        from specbasis.measures.table import choose

        for what, given in (("ranks", self.ranks), ("subspace", self.subspace)):
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise InputError(f"got {what} = {given!r}; want a whole number, at least 1")
        if self.subspace > self.ranks:
            raise InputError(
                f"got subspace = {self.subspace} and ranks = {self.ranks}; want no more than the ranks compared"
            )
        known = {*ROLES, *(role.partition(".")[0] for role in ROLES)}
        unknown = [role for role in self.roles if role not in known]
        if unknown:
            raise InputError(f"no role {', '.join(unknown)}; there is: {', '.join(ROLES)}")
        if self.null_samples < 0 or (self.heads is not None and self.heads < 1):
            raise InputError(
                f"got null_samples = {self.null_samples}, heads = {self.heads}; want at least 0 samples and 1 head"
            )
        if self.approximate and (self.nulls or self.null_samples):
            raise InputError(
                "nulls need the whole spectrum, which approximate does not compute; leave one of them out"
            )
        choose(self.measures, measures=self.table)

    def heads_of(self, base: Checkpoint, matched: MatrixPair) -> tuple[int, bool] | None:
        """How many attention heads a matrix is cut into, and whether by columns; None where there are none to
        take.
        """
        from specbasis.core.attention_heads import head_count
        from specbasis.measures.table import reads

        key = matched.key
        wanted = reads(self.taken, "heads")
        heads = head_count(base.config, key.role, key.stack, matched.base.shape, self.heads) if wanted else 0
        return (heads, key.role.endswith(".output")) if heads else None

    @property
    def filter(self) -> Callable[[MatrixKey], bool] | None:
        """`admits`, or None where every matrix is asked for."""
        return self.admits if self.roles or self.blocks or self.name else None

    def admits(self, key: MatrixKey) -> bool:
        """Whether a matrix is among those asked for."""
        return (
            (not self.roles or any(key.role == role or key.role.startswith(role + ".") for role in self.roles))
            and (not self.blocks or key.block in self.blocks)
            and (not self.name or fnmatch.fnmatchcase(key.name, self.name))
        )
