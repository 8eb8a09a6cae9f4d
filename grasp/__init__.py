"""grasp: structured pruning of large language models under an exact budget."""
