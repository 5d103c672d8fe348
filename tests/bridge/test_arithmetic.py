"""Helpers on integers that jax programs reach only with x64: unsigned 64-bit division against numpy."""

import numpy as np
import torch

from npu_bridge.runtime.arithmetic import unsigned_divide, unsigned_remainder


def test_unsigned_64_bit_division_is_exact_over_the_whole_range():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 64, 4096, dtype=np.uint64)
    y = rng.integers(0, 1 << 64, 4096, dtype=np.uint64) >> rng.integers(0, 64, 4096, dtype=np.uint64)
    top, half = np.uint64(2**64 - 1), np.uint64(1 << 63)
    edges = np.array(
        [
            (top, top),
            (top, 1),
            (half, half),
            (top, half - np.uint64(1)),
            (half - np.uint64(1), half),
            (0, top),
            (7, 0),
            (0, 0),
        ],
        np.uint64,
    )
    x, y = np.concatenate([x, edges[:, 0]]), np.concatenate([y, edges[:, 1]])

    def bits(a):
        return torch.from_numpy(a.view(np.int64))

    quotient, rest = (f(bits(x), bits(y)).numpy().view(np.uint64) for f in (unsigned_divide, unsigned_remainder))
    some = y != 0
    assert (quotient[some] == x[some] // y[some]).all() and (rest[some] == x[some] % y[some]).all()
    assert (quotient[~some] == top).all() and (rest[~some] == x[~some]).all(), "XLA: all bits set, and the dividend"
