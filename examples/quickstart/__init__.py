"""Data of the quickstart: six tasks on real images, small enough for two CPU cores, from packages and committed assets.

`python -m examples.quickstart.build --out data/quickstart` writes everything.
"""
