"""Real images small enough to learn from on two processor cores: six tasks, built from packages and committed art.

`python -m examples.quickstart.build --out data/quickstart` writes everything; `build.py` says what and why.
"""
