"""Trains MindVL: `python train.py --config configs/quickstart.yaml [--set run.seed=3 training.phases[0].steps=50 ...]`."""

import argparse
import sys

from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.host_memory import relaunch_with_large_pages


def main() -> int:
    parser = argparse.ArgumentParser(description="Train MindVL through the phases of a configuration; an interrupted run continues by itself.")
    parser.add_argument("--config", required=True, help="YAML configuration, for example configs/quickstart.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="dotted overrides, for example run.seed=3")
    args = parser.parse_args()
    try:
        config = config_loader.load(args.config, args.set)
        if config.data.quickstart:
            from examples.quickstart.build import prepare

            prepare(config.data.quickstart)
        from mindvl_jax.training.trainer import train  # after the configuration is known to be good: this loads jax

        train(config)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    relaunch_with_large_pages()
    sys.exit(main())
