"""Which matrices of a model a verb works on: by role, by block, by name. The one filter of all verbs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbasis.core.errors import InputError, guess
from specbasis.core.options import SELECTION, Options, option

if TYPE_CHECKING:
    from specbasis.architecture.key import MatrixKey


@dataclass(frozen=True)
class Selection(Options):
    """Matrices by role, block and name; all of them by default.

    Raises:
        InputError: there is no such role.
    """

    roles: tuple[str, ...] = option((), "only these roles, e.g. ffn,attention.query", panel=SELECTION)
    blocks: tuple[int, ...] = option((), "only these blocks, e.g. 0,10:12", panel=SELECTION)
    name: str = option("", "only matrices whose name matches this pattern (* and ?)", panel=SELECTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roles:
            check_roles(self.roles)

    @property
    def filter(self) -> Callable[[MatrixKey], bool] | None:
        """`admits`, or None where every matrix is asked for."""
        return self.admits if self.roles or self.blocks or self.name else None

    def notes(self, keys: Iterable[MatrixKey]) -> list[str]:
        """A sentence that names what is asked for and no matrix has, role or block; none where all are had."""
        keys = list(keys)
        alone = {role: Selection(roles=(role,)) for role in self.roles}
        roles = [role for role in self.roles if not any(map(alone[role].admits, keys))]
        blocks = [block for block in self.blocks if all(key.block != block for key in keys)]
        unmatched = [f"role {role}" for role in roles] + [f"block {block}" for block in blocks]
        return [f"no matrix here has {', '.join(unmatched)}"] if unmatched else []

    def admits(self, key: MatrixKey) -> bool:
        """Whether a matrix is among those asked for; a role such as "attention" stands for all that it begins."""
        return (
            (not self.roles or any(key.role == role or key.role.startswith(role + ".") for role in self.roles))
            and (not self.blocks or key.block in self.blocks)
            and (not self.name or fnmatch.fnmatchcase(key.name, self.name))
        )


def check_roles(roles: tuple[str, ...]) -> None:
    """Refuse a role that does not exist, with the nearest that does.

    Raises:
        InputError: there is no such role.
    """
    from specbasis.architecture.key import ROLES

    known = list(dict.fromkeys((*ROLES, *(role.partition(".")[0] for role in ROLES))))
    absent = [role for role in roles if role not in known]
    if absent:
        raise InputError(f"no role {', '.join(absent)}; {guess(absent[0], known)}there is: {', '.join(ROLES)}")
