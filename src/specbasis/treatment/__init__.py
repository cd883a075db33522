"""From diagnosis to treatment: a finished finetune made small, combined with others, or repaired."""
