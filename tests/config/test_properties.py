"""Configurations changed at random: each is accepted or refused in one short message, never anything else."""

from __future__ import annotations

import copy
import math
import random

import yaml

from mindvl_jax.config import loader
from mindvl_jax.config.loader import ConfigError
from tests.config.test_config_loader import MINIMAL

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "=1+1",
    "[/b]",
    "1e3",
    "${HOME}",
    "nan",
    "true",
    "x" * 5000,
    [],
    [1],
    [None],
    ["a", "a"],
    {},
    {"a": 1},
    {"": {}},
    [[[[]]]],
    {"extends": "x"},
    "词",
    "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
]
ROUNDS = 400


def places(node, path=()):
    """Every place of a tree that can be changed."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(rng: random.Random) -> dict:
    content = copy.deepcopy(yaml.safe_load(MINIMAL))
    extra = [
        "evaluation",
        "validation",
        "checkpoint",
        "logging",
        "mesh",
        "distributed",
        "adapters",
        "profile",
        "tokenizer",
        "bridge",
    ]
    for _ in range(rng.randint(1, 3)):
        *parents, last = rng.choice(list(places(content)))
        inner = content
        for parent in parents:
            inner = inner[parent]
        kind = rng.random()
        if kind < 0.6:
            inner[last] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.75 and isinstance(inner, dict):
            inner[rng.choice(["steps", "name", "path", "x", *extra])] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.9:
            content[rng.choice(extra)] = copy.deepcopy(rng.choice(VALUES))
        else:
            del inner[last]
    return content


def test_changed_configurations_are_accepted_or_refused_in_a_short_message():
    accepted = 0
    for seed in range(ROUNDS):
        content = changed(random.Random(seed))
        try:
            config = loader.from_mapping(content)
        except ConfigError as error:
            assert len(str(error)) < 8000, seed
        else:
            accepted += 1
            assert loader.from_mapping(yaml.safe_load(loader.dump(config))) == config, seed
    assert 0 < accepted < ROUNDS / 2, accepted
