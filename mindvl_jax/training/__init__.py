"""State, step, loop, phases, checkpoints. Knows nothing of dataset file formats."""
