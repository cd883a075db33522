"""What a parameter means: its block, its role, and how to read it as matrices (out, in).

Families are data: one file each in `families/`. Fused, interleaved, stacked, transposed and convolutional layouts
end here; everything above sees (out, in) matrices.
"""
