"""Where a method goes: modules of a live model by role and block or by name, and its task head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from specbasis.adapter.layouts import matrix_shape
from specbasis.adapter.task_heads import fresh_modules, head_modules
from specbasis.architecture.key import ROLES, MatrixRef
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError

FEED_FORWARD = ("ffn.up", "ffn.gate", "ffn.down")
"""The matrices of a feed-forward network; a gate only where there is one."""

ALL_LINEAR = tuple(role for role in ROLES if "." in role)
"""Every matrix of attention and feed-forward networks."""


@dataclass(frozen=True)
class Site:
    """One module that a method adapts.

    Attributes:
        name: the module's name in the model.
        shape: (out, in) of its weight as a matrix.
        roles: what it computes; several where one weight holds several matrices.
        block: number of its block; None where the module was named, not found by role.
    """

    name: str
    shape: tuple[int, int]
    roles: tuple[str, ...] = ()
    block: int | None = None

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.shape)


def sites(model: nn.Module, roles: Collection[str], blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
    """The modules whose weights have one of these roles, in these blocks, in the model's order.

    Args:
        model: a transformers model without adapters; on the meta device too.
        roles: of `ROLES`.
        blocks: numbers of blocks, negative ones counted from the last of each stack; all when None.

    Raises:
        InputError: a role or block does not exist, the architecture is not known, or a weight holds a wanted and
            an unwanted matrix.
    """
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise InputError(f"got role {unknown[0]!r}; want some of {', '.join(ROLES)}")
    by_module: dict[str, list[MatrixRef]] = defaultdict(list)
    for ref in model_map(open_checkpoint(dict(model.state_dict()))).matrices:
        if ref.key.block is not None and ref.expert is None:
            by_module[ref.parameter.rpartition(".")[0]].append(ref)
    counts: dict[str, int] = {}  # blocks of each stack
    for ref in (ref for refs in by_module.values() for ref in refs):
        counts[ref.key.stack] = max(counts.get(ref.key.stack, 0), (ref.key.block or 0) + 1)
    most = max(counts.values(), default=0)
    outside = [block for block in blocks or () if not -most <= block < most]
    if outside or (blocks is not None and not blocks):
        want = f"want some of −{most} … {most - 1}"
        raise InputError(f"got block {outside[:1] or blocks} for {type(model).__name__}; {want}")
    chosen: list[Site] = []
    for name, refs in by_module.items():
        stored = tuple(ref.key.role for ref in refs)
        wanted, key = set(stored) & set(roles), refs[0].key
        if not wanted or not (blocks is None or key.block in [b % counts[key.stack] for b in blocks]):
            continue
        if wanted != set(stored):
            raise InputError(
                f"{name}: one weight holds {', '.join(stored)}; an adapter takes all of it or nothing: ask for all "
                "of these roles, or for none"
            )
        chosen.append(Site(name, matrix_shape(model.get_submodule(name), name), stored, refs[0].key.block))
    if not chosen:
        known = sorted({ref.key.role for refs in by_module.values() for ref in refs} - {"other"})
        raise InputError(
            f"{type(model).__name__} has no module with a role of {', '.join(roles)}; its known roles are "
            f"{', '.join(known) or 'none: the architecture is not recognised'}; choose others, or name modules "
            "with target_modules"
        )
    return tuple(chosen)


def named_sites(model: nn.Module, targets: Collection[str]) -> tuple[Site, ...]:
    """The modules of these names, or whose names end so.

    Raises:
        InputError: a name fits no module with a matrix.
    """
    matrices = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim >= 2
        and not isinstance(module, nn.Embedding)
    }  # fmt: skip
    chosen: dict[str, Site] = {}
    for target in targets:
        fits = [target] if target in matrices else [name for name in matrices if name.endswith(f".{target}")]
        if not fits:
            raise InputError(f"no module with a matrix is called {target!r}, or ends so; see model.named_modules()")
        chosen |= {name: Site(name, matrix_shape(matrices[name], name)) for name in fits}
    return tuple(chosen[name] for name in matrices if name in chosen)


def trained_whole(model: nn.Module) -> list[str]:
    """Modules that every method trains besides its own parameters: the task head, and what the base lacks.

    The task head is what stands outside of the backbone and does not hold the output embedding (that of a language
    model is pretrained). A pooler inside the backbone counts only if the base checkpoint has no weights for it.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outside = [name for name in head_modules(model) if output not in list(model.get_submodule(name).modules())]
    return sorted({*outside, *fresh_modules(model)})
