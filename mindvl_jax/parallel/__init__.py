"""Which dim goes on which mesh axis. Knows nothing of files or tokens."""
