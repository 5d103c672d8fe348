"""Random bits equal to JAX's, bit for bit. uint32 is kept as int32, whose additions wrap alike."""

from __future__ import annotations

import torch

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _rotate(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x << n) | ((x >> (32 - n)) & ((1 << n) - 1))


def math_threefry2x32(
    k0: torch.Tensor, k1: torch.Tensor, x0: torch.Tensor, x1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). int32 tensors
    of one shape; keys may be scalars.
    """
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    a, b = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ _rotate(b, r)
        a = a + keys[(i + 1) % 3]
        b = b + (keys[(i + 2) % 3] + (i + 1))
    return a, b


_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of constant * x for x in [0, 2^32) held as int64.

    Split, because the product needs 64 unsigned bits.
    """
    low_half, high_half = x & 0xFFFF, x >> 16
    low = constant * low_half
    high = constant * high_half + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(counter: list[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Philox-4x32 with 10 rounds on int64 tensors that hold 32-bit numbers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        h0, l0 = _multiply(_PHILOX_M[0], c0)
        h1, l1 = _multiply(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return [c0, c1, c2, c3]


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x & _MASK, (x >> 32) & _MASK


def rng_bit_generator(state: torch.Tensor, shape: tuple[int, ...], dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """XLA's RngBitGenerator as its CPU and GPU compilers expand it: Philox-4x32-10 for the default algorithm.

    state: int64 (2,) or (3,) holding uint64 words, the key first. dtype: ui8, ui16, ui32 or ui64. Returns (new state,
    bits of `dtype` and `shape`).
    """
    count = 1
    for n in shape:
        count *= n
    words = count * 2 if dtype == "ui64" else count
    blocks = (words + 3) // 4
    key = _halves(state[0])
    low = state[1]
    step = torch.arange(blocks, dtype=torch.int64, device=state.device)
    high = state[2] if state.shape[0] == 3 else state[0]
    position = low + step
    carry = ((position ^ -(1 << 63)) < (low ^ -(1 << 63))).to(torch.int64)  # unsigned overflow of the low word
    counter = [*_halves(position), *_halves(high + carry)]
    bits = torch.stack(_philox(counter, key), 1).reshape(-1)[:words]
    if dtype == "ui64":
        pairs = bits.reshape(-1, 2)
        bits = pairs[:, 0] | (pairs[:, 1] << 32)
        made = bits.reshape(shape)
    else:
        made = bits.to({"ui32": torch.int32, "ui16": torch.int16, "ui8": torch.uint8}[dtype]).reshape(shape)
    new = state.clone()
    new[1] = low + blocks
    return new, made
