"""Watching a model's forward on a small made-up batch: which module is called when, and what it returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from specbasis.checkpoint.entry import first_line

_CARRIED = ("hidden_states", "attentions", "past_key_values", "cross_attentions", "loss")


@dataclass(frozen=True)
class Probe:
    """A made-up batch of examples of unequal length, padded on the right; the mask is None for images."""

    batch: Mapping[str, Tensor]
    mask: Tensor | None


def make_probe(model: nn.Module, rows: int, tokens: int) -> Probe:
    """Random tokens (the last of each example the end-of-sequence token) or random pixels, the same each time."""
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    inner = getattr(model, "base_model", model)
    name = str(getattr(model, "main_input_name", None) or getattr(inner, "main_input_name", "input_ids"))
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
        return Probe({name: pixels.to(first)}, None)
    vocabulary = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    settings = (getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    tokens_of = (setting[0] if isinstance(setting, list | tuple) and setting else setting for setting in settings)
    pad, end = (token if isinstance(token, int) and 0 <= token < vocabulary else None for token in tokens_of)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    special = [token for token in (pad, end) if token is not None]
    plain = next(n for n in range(vocabulary) if n not in special)
    for token in special:
        ids[ids == token] = plain
    lengths = torch.tensor([tokens, *(tokens // 2 + row for row in range(rows - 1))])
    mask = torch.arange(tokens) < lengths[:, None]
    if end is not None and end != pad:
        ids[torch.arange(rows), lengths - 1] = end
    ids[~mask] = pad if pad is not None else plain
    return Probe(
        {name: ids.to(first.device), "attention_mask": mask.long().to(first.device)}, mask.to(first.device)
    )


def outputs(result: Any, mask: Tensor | None) -> list[Tensor]:
    """The floating-point outputs that training and evaluation read, at the positions that are no padding."""
    named = result if isinstance(result, Mapping) else {"": result}
    leaves = pytree.tree_leaves([value for name, value in named.items() if name not in _CARRIED])
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    return [t[mask] if mask is not None and t.shape[:2] == mask.shape else t for t in tensors]


def agree(got: Sequence[Tensor], want: Sequence[Tensor], relative: float = 0.0) -> bool:
    """Whether outputs are equal but for rounding: to a multiple of eps, or a given part, of the greatest of them.

    The multiple is 64 in float32, and 8 in half precision, where 64 would let anything pass.
    """

    def near(a: Tensor, b: Tensor) -> bool:
        eps = torch.finfo(b.dtype).eps
        tolerance = max(relative, (64 if eps < 1e-5 else 8) * eps)
        return float((a - b).abs().max()) <= tolerance * float(b.abs().max()) + 1e-12

    if [t.shape for t in got] != [t.shape for t in want]:
        return False
    return all(near(a.detach(), b.detach()) for a, b in zip(got, want, strict=True) if b.numel())


def weighted(tensors: Sequence[Tensor]) -> Tensor | None:
    """A random linear function of outputs, the same each time; None where none of them carries a gradient."""
    generator = torch.Generator().manual_seed(1)
    parts = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in tensors if t.requires_grad]
    return torch.stack([part.float() for part in parts]).sum() if parts else None


@dataclass(eq=False)
class Call:
    """One call of a module: when it began and ended, inside of which call, and what it returned."""

    module: str
    number: int
    start: int
    parent: Call | None
    end: int = -1
    spec: Any = None
    leaves: Sequence[Any] = ()

    @property
    def key(self) -> tuple[str, int]:
        """The module and which of its calls this is."""
        return self.module, self.number


def record(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Call], Any]:
    """All calls in a forward pass with gradients, by their start, and the model's result."""
    calls: list[Call] = []
    stack: list[Call] = []
    numbers: Counter[str] = Counter()
    clock = iter(range(10**9))

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            call = Call(name, numbers[name], next(clock), stack[-1] if stack else None)
            numbers[name] += 1
            calls.append(call)
            stack.append(call)

        return hook

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        call = stack.pop()
        call.leaves, call.spec = pytree.tree_flatten(output)
        call.end = next(clock)

    modules = list(model.named_modules())
    before = [module.register_forward_pre_hook(enter(name)) for name, module in modules]
    after = [module.register_forward_hook(leave) for _, module in modules]
    with hooked(*before, *after), torch.enable_grad():
        return calls, model(**batch)


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that are there; at the end they are taken away."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrix_work(model: nn.Module, calls: Iterable[Call]) -> list[tuple[Call, int]]:
    """Entries of the matrices that each call multiplies by: its multiply–adds for each token."""
    modules = dict(model.named_modules())
    return [
        (call, sum(p.numel() for p in modules[call.module].parameters(recurse=False) if p.dim() > 1))
        for call in calls
        if not isinstance(modules[call.module], nn.Embedding)  # a table: nothing is multiplied
    ]


def leaves_of(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves of autograd's graph that tensors depend on."""
    tensors = list(tensors)
    leaves: set[int] = {id(t) for t in tensors if t.is_leaf and t.requires_grad}
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return leaves


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and noise in place of trained tensors that are zero; afterwards all is as it was.

    Training starts with a zero core, factor or head, behind which nothing shows what the model reads.
    """
    generator = torch.Generator().manual_seed(2)
    zeros = [p for p in model.parameters() if p.requires_grad and not p.is_meta and not bool(p.any())]
    with evaluating(model):
        try:
            for p in zeros:
                p.data.copy_(0.02 * torch.randn(p.shape, generator=generator))
            yield
        finally:
            for p in zeros:
                p.data.zero_()


def one_line(error: Exception) -> str:
    """An error of somebody else's code in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
