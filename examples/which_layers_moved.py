"""Which matrices did a finetune turn the most, and was it the size of the update or its direction?

Run: python examples/which_layers_moved.py [BASE TUNED]
"""

import sys

import specbasis

DEFAULT = (
    "pkg:anarcii/models/antibody/antibody_4_2_128_512.pt",
    "pkg:anarcii/models/tcr/tcr_4_2_128_512.pt",
)

result = specbasis.compare(*(sys.argv[1:3] or DEFAULT), ranks=30)
rows = result.to_pandas()

# One line per matrix: mean alignment of the leading ten ranks beside the size of the update.
leading = rows[(rows["measure"] == "alignment_left") & (rows["index"] < 10) & rows["resolved"].eq(True)]
by_matrix = leading.groupby("matrix", observed=True)["value"].mean().rename("alignment").to_frame()
size = rows[rows["measure"] == "relative_update"].set_index("matrix")["value"]
by_matrix["relative_update"] = size

print(result.verdicts[result.pairs[0]].sentence)
print(by_matrix.sort_values("alignment").head(8).to_string(float_format="%.3f"))
print(f"rank correlation of alignment with size: {by_matrix.corr(method='spearman').iloc[0, 1]:.2f}")
