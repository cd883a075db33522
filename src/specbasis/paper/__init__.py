"""Experiments of the paper, one a file: each returns a frozen configuration or frozen data."""
