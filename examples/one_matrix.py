"""The decomposition by itself: singular values with bounds, and which ranks can be told apart."""

import torch

import specbasis

base = specbasis.open_checkpoint("pkg:anarcii/models/antibody/antibody_4_2_128_512.pt")
name = "encoder.layers.0.positionwise_feedforward.fc_1.weight"
W = base[name]

svd = specbasis.decompose(W, ranks=10)
print(f"{name}, {tuple(W.shape)}, {W.dtype}")
print("rank  singular value   relative gap   bound on sin(angle)")
for i, (value, gap, bound) in enumerate(zip(svd.S, svd.relative_gap, svd.bound, strict=True), start=1):
    print(f"{i:4d}  {value:14.9f}  {gap:13.2e}  {bound:12.2e}")

# Rounding the weights to bfloat16 moves the vectors by far more than the bound: that is not numerical error.
rounded = specbasis.decompose(W.to(torch.bfloat16), ranks=10)
print("alignment with the same matrix in bfloat16:", (svd.U * rounded.U).sum(0).abs().min().item())
