"""The frozen-prefix cache: what lies below the first trained module runs once an example, and training starts there."""

from specbasis.finetune.prefix.cut import Cut, Kept, Uncut, find_cut
from specbasis.finetune.prefix.store import PrefixCache

__all__ = ["Cut", "Kept", "PrefixCache", "Uncut", "find_cut"]
