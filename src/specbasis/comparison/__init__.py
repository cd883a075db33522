"""What finetuning changed: the comparison of a base with its finetunes, and what it adds up to."""
