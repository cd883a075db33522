"""The configuration of a spectral adapter, as PEFT keeps it in adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from peft import PeftConfig, PeftType

from specbasis.checkpoint.adapter_file import FROM_DATA
from specbasis.checkpoint.pattern import SQUARE, check_pattern
from specbasis.core.errors import InputError
from specbasis.core.patterns import Matcher

NAME = "SPECTRAL"
FILE_NAME = f"{NAME}: run `from specbasis.adapter import SpectralConfig` first"
"""How adapter_config.json names the method. PEFT without specbasis stops with a KeyError that shows this text."""


_NOT_SAVED = ("basis_file", "rank", "layers_to_transform", "target_parameters")

DEFAULT_RANK = 300
"""Singular vectors of a layer where none are asked for (Yu et al. 2026, App. M)."""


@dataclass
class SpectralConfig(PeftConfig):
    """Configuration of a spectral adapter: W' = W + U[:, k:m] M Vh[k:m, :], only M trained.

    Args:
        interval: ranks [k, m) of the singular vectors, 0-based, m excluded; by default the first 300, or all of a
            layer that has fewer.
        rank: shorthand for interval (0, rank).
        interval_pattern: intervals of single layers: {regular expression at the end of the module name: (k, m)}.
        pattern: which coefficients of each square of ranks are trained: "square", all; "diagonal"; "band:WIDTH",
            all with |i − j| <= WIDTH; "scattered:COUNT", at random positions unless `set_positions` or
            `place_coefficients` chooses; or {regular expression at the end of the module name: one of these},
            where a module that none matches has its square.
        target_modules: names (endings) of modules, a regular expression, or "all-linear"; by default both matrices
            of every feed-forward network, where the architecture is known.
        exclude_modules: names or a regular expression of modules to leave out.
        blocks_to_transform: indices of the blocks to adapt; negative ones count from the last block.
        layers_to_transform: PEFT's name for ``blocks_to_transform``; give one of the two.
        layers_pattern: name of the list of blocks, where a module's name holds several numbers.
        scale: "none", or "sigma" for coefficients in units of the singular values (LoRA-XS, PSOFT with free R).
        basis: "pretrained" singular vectors; "gradient", those of the loss gradient over some batches, which
            `initialize_gradient_basis` is given; "from:PATH", those of the same matrix in another checkpoint; or a
            control, with ":SEED" behind it if wanted: "random" orthonormal vectors, or "shuffled", right singular
            vectors paired with left ones of other ranks.
        init: "zero" (the model starts bit-equal to its base) or "normal" (small random coefficients).
        dropout: share of input features dropped on the adapter's path in training.
        save_basis: put U and Vh into the adapter file. Without, loading decomposes the base again and refuses if
            any
            vector is not the trained one; the file is then little more than M.
        basis_file: a base-level basis file that many adapters share: read if it exists, written if not; or an
            existing folder, used as a cache of decompositions (`specbasis.jobs.cache.Cache`). Not saved.
        modules_to_save: modules trained and saved whole. A task head and pooler that the base checkpoint lacks are
            added by themselves.
        shard_basis: hold U and Vh as parameters without gradient, which FSDP shards.
        file_format: set by saving; tells a loaded configuration from a new one.
        target_parameters: stacked experts in PEFT's other methods; refused here, with the reason.
        seal: set by saving: digests of the file, and what tells the base, see `AdapterFile.prove`.
    """

    interval: tuple[int, int] | None = None
    rank: int | None = None
    interval_pattern: dict[str, tuple[int, int]] | None = None
    pattern: str | dict[str, str] = SQUARE
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    blocks_to_transform: list[int] | int | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    scale: str = "none"
    basis: str = "pretrained"
    init: str = "zero"
    dropout: float = 0.0
    save_basis: bool = True
    basis_file: str | None = None
    modules_to_save: list[str] | None = None
    shard_basis: bool = False
    file_format: int | None = None
    seal: dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    _saving = False
    _matched: ClassVar[dict[str, set[str]]] = {}  # of each pattern the modules that it matches
    _place: ClassVar[Any] = None  # where it was loaded from: folder or name, subfolder, options of the download

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.rank is not None:
            if self.interval is not None and tuple(self.interval) != (0, self.rank):
                raise InputError(f"got interval = {self.interval} and rank = {self.rank}; want one of the two")
            self.interval = (0, self.rank)
        self.interval = None if self.interval is None else _pair(self.interval)
        self.interval_pattern = {name: _pair(pair) for name, pair in (self.interval_pattern or {}).items()}
        for pattern in self.pattern.values() if isinstance(self.pattern, dict) else [self.pattern]:
            check_pattern(pattern)
        chosen = [blocks for blocks in (self.blocks_to_transform, self.layers_to_transform) if blocks is not None]
        if any(blocks != chosen[0] for blocks in chosen):
            raise InputError(
                f"got blocks_to_transform = {self.blocks_to_transform} and layers_to_transform = "
                f"{self.layers_to_transform}; want one of the two"
            )
        self.choose_blocks(next(iter(chosen), None))
        if isinstance(self.target_modules, (list, set, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own form
        if not re.fullmatch(r"pretrained|gradient|(random|shuffled)(:\d+)?|from:.+", self.basis):
            raise InputError(
                f"got basis = {self.basis!r}; want 'pretrained', 'gradient', 'random', 'shuffled' or 'from:PATH'"
            )
        if (self.basis in FROM_DATA or self.basis.startswith("from:")) and not self.save_basis:
            raise InputError(
                f"got basis = {self.basis!r} with save_basis = False; want save_basis = True: the base alone does "
                "not give these vectors again"
            )
        if self.target_parameters:
            raise InputError(
                f"got target_parameters = {self.target_parameters}; a spectral adapter wraps layers, and "
                "experts stacked in one parameter are none: name layers in target_modules, or use LoRA for them"
            )
        for field in ("modules_to_save", "layers_pattern"):
            given = getattr(self, field) or []
            for name in [given] if isinstance(given, str) else given:
                if re.search("[*+?{]", name):
                    raise InputError(f"got {name[:80]!r} in {field}; want names: repetitions are not matched there")
        if not 0 <= self.dropout < 1:
            raise InputError(f"got dropout = {self.dropout}; want 0 <= dropout < 1")
        if self.file_format not in (None, 1, 2):
            raise InputError(
                f"the adapter folder has format {self.file_format}; this version of specbasis reads 1 and 2: "
                "upgrade it"
            )

    bias = "none"

    def choose_blocks(self, blocks: list[int] | int | None) -> None:
        """Set the blocks, under PEFT's name for them too, which its matching of names reads."""
        self.blocks_to_transform = self.layers_to_transform = blocks

    def match(self, modules: Iterable[str]) -> None:
        """Match the patterns among the names of modules in bounded time; PEFT's own way may backtrack for ever.

        Raises:
            InputError: as `Matcher.first`.
        """
        matcher, names = Matcher("target_modules and exclude_modules"), list(modules)
        patterns = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        self._matched = {p: {name for name in names if matcher.whole(p, name)} for p in patterns}

    def matched(self, module: str) -> SimpleNamespace:
        """What of the configuration PEFT's matching of a name reads, with names in place of patterns."""
        fields = dict(vars(self))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields[name], str):
                fields[name] = [module] if module in self._matched.get(fields[name], ()) else []
        return SimpleNamespace(**fields)

    def interval_of(self, module_name: str, shape: tuple[int, int]) -> tuple[int, int]:
        """The interval for a module: the first pattern that matches the end of its name, else the common one."""
        patterns = self.interval_pattern or {}
        pattern = Matcher("interval_pattern").first(patterns, module_name)
        return (self.interval or (0, min(DEFAULT_RANK, *shape))) if pattern is None else patterns[pattern]

    def pattern_of(self, module_name: str) -> str:
        """The pattern of a module's coefficients."""
        if isinstance(self.pattern, str):
            return self.pattern
        return self.pattern.get(Matcher("pattern").first(self.pattern, module_name) or "", SQUARE)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as adapter_config.json holds it, without the seal, which belongs to one file."""
        fields = super().to_dict()
        for name in _NOT_SAVED if self._saving else (*_NOT_SAVED, "seal"):
            del fields[name]
        if isinstance(fields["target_modules"], set):
            fields["target_modules"] = sorted(fields["target_modules"])
        if self.pattern == SQUARE:  # as version 0.1 wrote it, and reads it
            del fields["pattern"]
        return {**fields, "peft_type": FILE_NAME, "file_format": 1 if self.pattern == SQUARE else 2}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the seal of the adapter that PEFT wrote just before."""
        self._saving = True
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self._saving = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a configuration; remembers where from, so that an incomplete file is refused before injection."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._place = pretrained_model_name_or_path, subfolder, kwargs
        return config


def _pair(pair: Any) -> tuple[int, int]:
    try:
        k, m = pair
        return int(k), int(m)
    except (TypeError, ValueError):
        raise InputError(f"got interval = {pair!r}; want two ranks (k, m)") from None
