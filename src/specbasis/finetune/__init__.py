"""Finetuning: methods, tasks, training, and the grids of experiments over them."""
