"""`python -m mindvl_jax.cli` is the `mindvl` command."""

import sys

from mindvl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
