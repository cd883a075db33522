"""What `compare` is asked for: one value that travels whole from the flag to the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.architecture.selection import Selection
from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_bytes, words
from specbasis.core.options import ADVANCED, check_choice, option

if TYPE_CHECKING:
    from specbasis.architecture.key import MatrixKey
    from specbasis.architecture.pair import MatrixPair
    from specbasis.checkpoint import Checkpoint
    from specbasis.measures.measure import Measure


ALWAYS = (
    "weight_cosine_z_limit", "rounding_noise_base", "rounding_noise_tuned", "beyond_rounding", "p_quantised",
)  # fmt: skip
"""What version 0.1 did not have and is taken whatever is asked for: the folders that it began go on."""

NEW = (*ALWAYS, "explained_variance_delta", "effective_rank_delta")
"""What version 0.1 did not have, where no measure is asked for by name."""


@dataclass(frozen=True)
class Options(Selection):
    """What to compare, how far down the spectrum, and where to compute.

    ``measures`` holds patterns of names, and functions: your own measures, taken beside the built-in ones (see
    `specbasis.measures`). What no measure reads is not decomposed: without those of the update, a third less work.
    ``null_samples`` costs one decomposition for each draw and kind; the draws are kept in ``cache``.
    ``quick`` takes only the measures of leading ranks, from a few steps of block Krylov iteration with products in
    float32 (`specbasis.core.krylov.quick_svd`), each rank with its own bound: resolved where that is at most 0.01,
    never guessed elsewhere. The rows depend on neither ``workers`` nor ``engine``.
    """

    quick: bool = option(False, "only the leading ranks, much faster, each with a measured bound")
    ranks: int | None = option(
        None, "leading ranks whose singular vectors are compared; default: 200, with --quick 16", least=1
    )
    subspace: int | None = option(
        None, "leading ranks k at which principal angles are taken; default: 10", panel=ADVANCED, least=1
    )
    common_rows: bool = option(False, "compare the common rows where a vocabulary grew", panel=ADVANCED)
    transposed: bool = option(
        False, "tuned is stored (in, out) and base (out, in), or the other way round", panel=ADVANCED
    )
    layout: tuple[str, ...] = option(
        (), "how weights are stored: PATTERN=conv or PATTERN=in_out, e.g. '*.W=conv'", panel=ADVANCED
    )
    measures: tuple[str | Callable[..., Any], ...] = option(
        (), "only these measures, e.g. 'alignment*,singular_value_*'", parse=lambda text, _: words(text)
    )
    nulls: bool = option(False, "what chance, size and rounding would give, with p-values")
    null_samples: int = option(0, "also decompose this many random updates of each kind", panel=ADVANCED, least=0)
    heads: int | None = option(
        None, "number of attention heads, if config.json does not give it", panel=ADVANCED, least=1
    )
    add: bool = option(
        False, "add these finetunes to the others of the same base in the folder", panel=ADVANCED, decides=False
    )
    stream: bool = option(False, "read only the needed bytes from the Hub", panel=ADVANCED, decides=False)
    workers: int | None = option(
        None, "matrices at the same time; default: one for each core", panel=ADVANCED, least=1, decides=False
    )
    memory: str | int | None = option(
        None, "memory for all workers, e.g. 8GB; default: half of the free", panel=ADVANCED, decides=False
    )
    engine: str = option("auto", "threads, processes, ray, or auto", panel=ADVANCED, decides=False)
    device: str = option("cpu", "cpu, cuda, cuda:1", panel=ADVANCED, decides=False)
    cache: str | Path | None = option(
        None, "folder in which decompositions are kept and found again", panel=ADVANCED, decides=False
    )

    def __post_init__(self) -> None:
        from specbasis.jobs.engine import ENGINES
        from specbasis.measures.table import choose

        super().__post_init__()
        check_choice("engine", self.engine, ENGINES)
        if self.subspace is None:
            object.__setattr__(self, "subspace", min(10, self.leading))
        if self.k > self.leading:
            raise InputError(
                f"got subspace = {self.k} and ranks = {self.leading}; want no more than the ranks compared"
            )
        if self.quick and (self.nulls or self.null_samples):
            raise InputError("nulls need the whole spectrum, which quick does not compute; leave one of them out")
        odd = [measure for measure in self.own if not callable(measure)]
        if odd:
            raise InputError(f"got {odd[0]!r} among the measures; want patterns of names, and functions")
        choose(self.patterns, measures=self.table)
        if self.budget is not None and self.budget < 1:
            raise InputError(f"got memory = {self.memory}; want more than nothing, such as '8GB'")

    @property
    def layouts(self) -> dict[str, str]:
        """Pattern of names → layout.

        Raises:
            InputError: one of them is no pattern with a layout.
        """
        layouts = dict(text.rpartition("=")[::2] for text in self.layout)
        wrong = [
            text
            for text in self.layout
            if not text.rpartition("=")[0] or text.rpartition("=")[2] not in ("conv", "in_out")
        ]
        if wrong:
            raise InputError(
                f"got layout {wrong[0]!r}; want a pattern of names and conv or in_out, such as '*.W=conv'"
            )
        return layouts

    def __getstate__(self) -> dict[str, Any]:
        # What is computed once in each process stays there: a table of functions cannot travel.
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @property
    def leading(self) -> int:
        """Number of leading ranks whose singular vectors are compared."""
        return self.ranks or (16 if self.quick else 200)

    @property
    def tolerance(self) -> float:
        """Bound up to which a figure is resolved."""
        from specbasis.core.krylov import QUICK
        from specbasis.measures.measure import RESOLVED

        return QUICK if self.quick else RESOLVED

    @property
    def k(self) -> int:
        """Number of leading ranks at which principal angles are taken."""
        assert self.subspace is not None
        return self.subspace

    @property
    def budget(self) -> int | None:
        """Bytes that the running workers may take together."""
        return parse_bytes(self.memory) if isinstance(self.memory, str) else self.memory

    @property
    def patterns(self) -> tuple[str, ...]:
        """The measures that are asked for by name."""
        return tuple(measure for measure in self.measures if isinstance(measure, str))

    @property
    def own(self) -> tuple[Callable[..., Any], ...]:
        """The user's own measures."""
        return tuple(measure for measure in self.measures if not isinstance(measure, str))

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

        chosen = choose(self.patterns, whole=not self.quick, measures=self.table)
        return tuple(m for m in self.table if m in chosen or m.source == OWN)

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

    def notes(self, keys: Iterable[MatrixKey]) -> list[str]:
        """What a reader must know of the selection, and of a quick comparison."""
        if not self.quick:
            return super().notes(keys)
        return [
            *super().notes(keys),
            f"quick: the leading {self.leading} ranks of each matrix; a figure is resolved where its bound is at "
            f"most {self.tolerance:g}; effective ranks are estimates; what needs the whole spectrum is left out",
        ]

    def config(self) -> dict[str, Any]:
        """What makes two comparisons the same, apart from the models."""
        from specbasis.measures.own import digest

        config = super().config()
        for later in ("transposed", "layout", "quick"):  # which version 0.1 did not have
            config = config if config[later] else {name: value for name, value in config.items() if name != later}
        new = ALWAYS if self.patterns else NEW
        return {
            **config,
            "approximate": False,  # which it had in place of quick
            "ranks": self.leading,
            "cached": self.cache is not None,
            "measures": [measure.name for measure in self.taken if measure.name not in new],
            "own": {function.__name__: digest(function) for function in self.own},
        }
