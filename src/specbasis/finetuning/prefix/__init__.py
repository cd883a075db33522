"""The frozen-prefix cache: what lies below the first trained module runs once an example; training starts there.

`find_cut` finds the place, `PrefixCache.build` computes and keeps the activations, `PrefixCache.collator` puts them
into batches, and inside of ``with cache.suffix(model):`` the model trains on such batches. `narrowed` is apart from
that: it spares a classifier on the first token the last block's work on all other tokens.
"""

from specbasis.finetuning.prefix.cut import Cut, Uncut, find_cut
from specbasis.finetuning.prefix.narrow import narrowed
from specbasis.finetuning.prefix.plan import Kept
from specbasis.finetuning.prefix.rows import NoPrefixError
from specbasis.finetuning.prefix.store import PrefixCache

__all__ = ["Cut", "Kept", "NoPrefixError", "PrefixCache", "Uncut", "find_cut", "narrowed"]
