"""Mathematics of matrices: no file, no model."""
