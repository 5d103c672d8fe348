"""Run folders: checkpoints and the id table."""
