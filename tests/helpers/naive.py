"""Every definition transcribed on its own, entry by entry, in plain Python and numpy."""

import math

import numpy as np


def cosine(x, y):
    return abs(sum(float(a) * float(b) for a, b in zip(x, y, strict=True)))


def alignment(X, Y):
    """a[i] = |⟨x_i, y_i⟩|."""
    return [cosine(X[:, i], Y[:, i]) for i in range(min(X.shape[1], Y.shape[1]))]


def overlap(X, Y, k):
    """‖X_kᵀ Y_k‖_F² / k."""
    return sum(cosine(X[:, i], Y[:, j]) ** 2 for i in range(k) for j in range(k)) / k


def relative_change(base, tuned):
    return [(t - b) / b for b, t in zip(base, tuned, strict=True)]


def rsd(base, tuned):
    """‖S_t − S_b‖₂ / ‖S_b‖₂."""
    return math.sqrt(sum((t - b) ** 2 for b, t in zip(base, tuned, strict=True))) / math.sqrt(
        sum(b**2 for b in base)
    )


def mrc(base, tuned):
    return sum(abs(t - b) / b for b, t in zip(base, tuned, strict=True)) / len(base)


def max_rc(base, tuned):
    return max(abs(t - b) / b for b, t in zip(base, tuned, strict=True))


def t1_rc(base, tuned):
    return (tuned[0] - base[0]) / base[0]


def tail_rc(base, tuned):
    """Mean signed relative change over the last 10 % of ranks (ceil)."""
    n = -(-len(base) // 10)
    last = range(len(base) - n, len(base))
    return sum((tuned[i] - base[i]) / base[i] for i in last) / n


def ratio(base, delta):
    """r[i] = S_i(delta) / S_i(base)."""
    return [d / b for b, d in zip(base, delta, strict=True)]


def effective_rank(S):
    """exp(H(p)), p = S / ΣS."""
    total = sum(S)
    return math.exp(-sum(s / total * math.log(s / total) for s in S if s > 0))


def stable_rank(W):
    """‖W‖_F² / ‖W‖₂², from the matrix."""
    return sum(float(w) ** 2 for w in W.flatten()) / np.linalg.norm(W, 2) ** 2


def explained_variance(S, W):
    """Cumulative ΣS² / ‖W‖_F², the norm from the matrix."""
    square = sum(float(w) ** 2 for w in W.flatten())
    return [sum(s**2 for s in S[: i + 1]) / square for i in range(len(S))]


def weight_cosine(base, tuned):
    """⟨base, tuned⟩_F / (‖base‖_F ‖tuned‖_F)."""
    inner = sum(float(b) * float(t) for b, t in zip(base.flatten(), tuned.flatten(), strict=True))
    norms = [math.sqrt(sum(float(w) ** 2 for w in W.flatten())) for W in (base, tuned)]
    return inner / (norms[0] * norms[1])
