"""Singular value decompositions to named numbers."""
