"""Train MindVL: `python train.py --config configs/quickstart.yaml`.

The same as `mindvl train`, without an installation.
"""

import sys

from mindvl_jax.cli.main import main
from mindvl_jax.core.compiled import share_compiled_programs
from mindvl_jax.core.host_memory import relaunch_with_large_pages

if __name__ == "__main__":
    relaunch_with_large_pages()
    share_compiled_programs()
    sys.exit(main(["train", *sys.argv[1:]]))
