"""The device programs of generation: read prompts, choose first tokens, admit to slots, decode, release.

Legend: B slots, R prompt rows, N admitted answers, T prompt places, S cache places a slot, V vocabulary, L layers.

All shapes are static. One decode program serves every request whatever its length, pictures or settings: what differs between
requests are values in the per-slot arrays. Prompts are read at a few bucketed sizes (see `buckets.py`).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.batch import Batch
from mindvl_jax.config import TextConfig
from mindvl_jax.inference import sampling
from mindvl_jax.models import KVCache

CHUNK = 32  # most tokens a slot can gain in one call of `decode`: the size of the arrays that come back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings, one entry for each admitted answer (N,) or slot (B,); see `request.Sampling`."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    penalty: jax.Array  # float32
    limit: jax.Array  # int32, most new tokens
    ignore_eos: jax.Array  # bool
    key: jax.Array  # (N, 2) uint32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All state of generation. A slot that is not active still computes; what it computes is overwritten or never read.

    Attributes:
      cache: keys and values, (L, B, S, K, H).
      token: (B,) int32, newest token of each slot, not yet in the cache.
      index: (B,) int32, cache place that `token` will take.
      position: (B,) int32, rotary position of `token` (all three rows of M-RoPE are equal for text).
      count: (B,) int32, tokens generated so far, `token` included.
      active: (B,) bool.
      seen: (B, V) bool, tokens of prompt and answer, for the repetition penalty.
    """

    cache: KVCache
    token: jax.Array
    index: jax.Array
    position: jax.Array
    count: jax.Array
    active: jax.Array
    seen: jax.Array
    settings: Settings


def empty_slots(config: TextConfig, slots: int, places: int, dtype) -> Slots:
    """Free slots."""
    zeros = lambda kind: jnp.zeros((slots,), kind)
    return Slots(
        cache=KVCache.empty(config, slots, places, dtype),
        token=zeros(jnp.int32), index=zeros(jnp.int32), position=zeros(jnp.int32), count=zeros(jnp.int32), active=zeros(bool),
        seen=jnp.zeros((slots, config.vocab_size), bool),
        settings=Settings(
            temperature=zeros(jnp.float32), top_k=zeros(jnp.int32), top_p=jnp.ones((slots,), jnp.float32),
            penalty=jnp.ones((slots,), jnp.float32), limit=zeros(jnp.int32), ignore_eos=zeros(bool), key=jnp.zeros((slots, 2), jnp.uint32),
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What reading R prompts leaves: cache (L, R, T, K, H), last logits (R, V) float32, next position and length (R,), seen (R, V)."""

    cache: KVCache
    logits: jax.Array
    position: jax.Array
    length: jax.Array
    seen: jax.Array


@partial(jax.jit, static_argnames=("graphdef", "has_pictures"))
def prefill(graphdef, params, batch: Batch, *, has_pictures: bool) -> Prefilled:
    """Reads R prompts, one a row, padded at the end.

    Args:
      has_pictures: static; False skips the vision tower (the batch's patches are then never looked at).
    """
    model = nnx.merge(graphdef, params)
    if has_pictures:
        inputs_RTD = model.embed(batch)
    else:
        inputs_RTD = model.language.embed(batch.tokens).astype(model.compute_dtype)
    R, T = batch.tokens.shape
    real_RT = batch.segment_ids > 0
    length_R = jnp.sum(real_RT, axis=1, dtype=jnp.int32)
    cache = KVCache.empty(model.language.config, R, T, inputs_RTD.dtype)
    hidden_RTD, cache = model.language(
        inputs_RTD, batch.positions, batch.segment_ids, segment_lengths=batch.segment_lengths,
        cache=cache, cache_index_B=jnp.zeros((R,), jnp.int32), cache_is_empty=True,
    )
    last_RD = jnp.take_along_axis(hidden_RTD, jnp.maximum(length_R - 1, 0)[:, None, None], axis=1)[:, 0]
    logits_RV = model.logits(last_RD)
    top_R = jnp.max(jnp.where(real_RT[:, None], batch.positions, -1), axis=(1, 2))
    rows = jnp.arange(R)[:, None]
    seen_RV = jnp.zeros(logits_RV.shape, jnp.int32).at[rows, batch.tokens].max(real_RT.astype(jnp.int32)) > 0
    return Prefilled(cache=cache, logits=logits_RV, position=(top_R + 1).astype(jnp.int32), length=length_R, seen=seen_RV)


@jax.jit
def first_tokens(logits_RV, seen_RV, row_N, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """First token (N,) int32 of each answer and its log-probability (N,) float32, from the last logits of its prompt's row.

    Apart from `admit`, whose shapes vary with the prompts' bucket: the sampling code is the slower one to compile.
    """
    logits_NV = logits_RV[row_N]
    penalised_NV = sampling.apply_repetition_penalty(logits_NV, seen_RV[row_N], settings.penalty)
    token_N = sampling.choose(
        penalised_NV, keys_B2=settings.key, counts_B=jnp.zeros(row_N.shape, jnp.int32),
        temperature_B=settings.temperature, top_k_B=settings.top_k, top_p_B=settings.top_p,
    )
    return token_N, sampling.log_probability(logits_NV, token_N)


@partial(jax.jit, donate_argnames=("slots",))
def admit(slots: Slots, prefilled: Prefilled, row_N, slot_N, token_N, settings: Settings, eos_E) -> Slots:
    """Puts N answers with their first tokens into slots.

    Args:
      row_N: prompt row of each answer; several answers may share one row (n samples of a prompt).
      slot_N: slot of each answer; a number past the last slot drops the entry (padding).
    """
    ended_N = (token_N[:, None] == eos_E[None]).any(-1) & ~settings.ignore_eos
    put = lambda old, new: old.at[slot_N].set(new.astype(old.dtype), mode="drop")
    T = prefilled.cache.places
    put_cache = lambda old, new: old.at[:, slot_N, :T].set(new[:, row_N].astype(old.dtype), mode="drop")
    return Slots(
        cache=KVCache(put_cache(slots.cache.keys, prefilled.cache.keys), put_cache(slots.cache.values, prefilled.cache.values)),
        token=put(slots.token, token_N),
        index=put(slots.index, prefilled.length[row_N]),
        position=put(slots.position, prefilled.position[row_N]),
        count=put(slots.count, jnp.ones_like(row_N)),
        active=put(slots.active, ~ended_N & (settings.limit > 1)),
        seen=put(slots.seen, prefilled.seen[row_N].at[jnp.arange(token_N.shape[0]), token_N].set(True)),
        settings=jax.tree.map(put, slots.settings, settings),
    )


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("slots",))
def decode(graphdef, params, slots: Slots, eos_E, steps, wanted) -> tuple[Slots, jax.Array, jax.Array, jax.Array]:
    """Generates until `steps` tokens a slot, until `wanted` of the active slots have finished, or until none is active.

    Args:
      eos_E: (E,) int32, tokens that end an answer. steps: int32 scalar, at most CHUNK. wanted: int32 scalar, at least 1.

    Returns:
      slots; tokens (CHUNK, B) int32, -1 where a slot gained none; log-probabilities (CHUNK, B) float32; active (B,).
    """
    model = nnx.merge(graphdef, params)
    B = slots.token.shape[0]
    at_start = jnp.sum(slots.active)

    def go_on(carry):
        step, slots, _, _ = carry
        left = jnp.sum(slots.active)
        return (step < steps) & (left > 0) & (at_start - left < wanted)

    def one(carry):
        step, slots, tokens_CB, logprobs_CB = carry
        inputs_B1D = model.language.embed(slots.token[:, None]).astype(model.compute_dtype)
        positions_B31 = jnp.broadcast_to(slots.position[:, None, None], (B, 3, 1))
        hidden_B1D, cache = model.language(inputs_B1D, positions_B31, jnp.ones((B, 1), jnp.int32), cache=slots.cache, cache_index_B=slots.index)
        logits_BV = model.logits(hidden_B1D[:, 0])
        settings = slots.settings
        token_B = sampling.choose(
            sampling.apply_repetition_penalty(logits_BV, slots.seen, settings.penalty), keys_B2=settings.key, counts_B=slots.count,
            temperature_B=settings.temperature, top_k_B=settings.top_k, top_p_B=settings.top_p,
        )
        logprob_B = sampling.log_probability(logits_BV, token_B)
        active_B = slots.active
        tokens_CB = tokens_CB.at[step].set(jnp.where(active_B, token_B, -1))
        logprobs_CB = logprobs_CB.at[step].set(logprob_B)
        ended_B = (token_B[:, None] == eos_E[None]).any(-1) & ~settings.ignore_eos
        grow_B = active_B.astype(jnp.int32)
        slots = Slots(
            cache=cache,
            token=jnp.where(active_B, token_B, slots.token),
            index=slots.index + grow_B,
            position=slots.position + grow_B,
            count=slots.count + grow_B,
            active=active_B & ~ended_B & (slots.count + 1 < settings.limit),
            seen=slots.seen.at[jnp.arange(B), token_B].set(True),
            settings=settings,
        )
        return step + 1, slots, tokens_CB, logprobs_CB

    start = (jnp.int32(0), slots, jnp.full((CHUNK, B), -1, jnp.int32), jnp.zeros((CHUNK, B), jnp.float32))
    _, slots, tokens_CB, logprobs_CB = jax.lax.while_loop(go_on, one, start)
    return slots, tokens_CB, logprobs_CB, slots.active


@partial(jax.jit, donate_argnames=("slots",))
def release(slots: Slots, keep_B) -> Slots:
    """Stops the slots where `keep_B` is False: the host has seen a stop string, or the request was withdrawn."""
    return dataclasses.replace(slots, active=slots.active & keep_B)
