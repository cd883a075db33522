"""A training seen through its checkpoints."""
