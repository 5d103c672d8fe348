"""Device programs of generation: prefill, choose first tokens, admit to slots, decode, release.

Legend: B slots, R prompt rows, N admitted answers, T prompt positions, S cache positions of a slot, V vocabulary, L
layers, D width.

All shapes are static. One decode program serves every request whatever its length, images or settings: requests differ
only in the values of the per-slot arrays. Prefill uses a few bucketed sizes (see `buckets.py`) and packs several
prompts into a row, as training does.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.inference import sampling
from mindvl_jax.models.layers.cache import Cache
from mindvl_jax.models.vision_language.batch import Batch

ALTERNATIVES = 20  # most alternatives that a request may ask for at each token
CHUNK = 32  # most tokens a slot can gain in one call of `decode`: the size of the returned arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings, one entry for each admitted answer (N,) or slot (B,); see `request.Sampling`."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    penalty: jax.Array  # float32
    presence: jax.Array  # float32
    frequency: jax.Array  # float32
    limit: jax.Array  # int32, most new tokens
    ignore_eos: jax.Array  # bool
    key: jax.Array  # (N, 2) uint32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of generation. An inactive slot still computes; its results are overwritten or never read.

    Attributes:
      cache: keys and values of prompts and answers.
      place: int32 scalar, cache position that the next token of every slot is written to.
      token: (B,) int32, newest token of each slot, not yet in the cache.
      index: (B,) int32, tokens of each slot in the cache.
      position: (B,) int32, rotary position of `token` (all three rows of M-RoPE are equal for text).
      count: (B,) int32, tokens generated so far, `token` included.
      active: (B,) bool.
      seen: (B, V) bool, tokens of prompt and answer, for the repetition penalty.
      counts: (B, V) int32, how often each token occurs in the answer, for the presence and frequency penalties.
    """

    cache: Cache
    place: jax.Array
    token: jax.Array
    index: jax.Array
    position: jax.Array
    count: jax.Array
    active: jax.Array
    seen: jax.Array
    counts: jax.Array
    settings: Settings


def new_slots(model, slots: int, context: int, *, unrolled: bool) -> Slots:
    """Free slots for the programs of this module over an empty cache of `context` positions."""
    cache = model.language.empty_cache(slots, context, model.compute_dtype, unrolled=unrolled)
    return empty_slots(cache, slots, model.language.config.vocab_size)


def check(settings: object, *, constrained: bool) -> None:
    """Refuse `request.Sampling` that these programs cannot do: none."""


def drafts(slots: Slots) -> tuple[int, int]:
    """Tokens that were drafted ahead, and how many of them were accepted: none here."""
    return 0, 0


def empty_slots(cache: Cache, slots: int, vocabulary: int) -> Slots:
    """Return free slots over an empty cache. `decode` with `DecodeParams` needs an unrolled one."""

    def zeros(kind):
        return jnp.zeros((slots,), kind)

    return Slots(
        cache=cache,
        place=jnp.int32(0),
        token=zeros(jnp.int32),
        index=zeros(jnp.int32),
        position=zeros(jnp.int32),
        count=zeros(jnp.int32),
        active=zeros(bool),
        seen=jnp.zeros((slots, vocabulary), bool),
        counts=jnp.zeros((slots, vocabulary), jnp.int32),
        settings=Settings(
            temperature=zeros(jnp.float32),
            top_k=zeros(jnp.int32),
            top_p=jnp.ones((slots,), jnp.float32),
            min_p=zeros(jnp.float32),
            penalty=jnp.ones((slots,), jnp.float32),
            presence=zeros(jnp.float32),
            frequency=zeros(jnp.float32),
            limit=zeros(jnp.int32),
            ignore_eos=zeros(bool),
            key=jnp.zeros((slots, 2), jnp.uint32),
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Result of prefilling R rows: keys and values (L, R, T, K, H), or what else the decoder's cache keeps
    (L, R, T, ..); hidden states after the final norm (R, T, D), tokens (R, T).
    """

    keys: jax.Array
    values: jax.Array
    hidden: jax.Array
    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Positions of the prompts of N answers in the prefilled rows, (N,) int32 each.

    Attributes: row: of the prompt. start: its first position there. length: its tokens. position: rotary position of
    the token after it.
    """

    row: jax.Array
    start: jax.Array
    length: jax.Array
    position: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """Parameters for `decode`: layers unstacked, plus the LM head (D, V)."""

    layers: tuple[nnx.State, ...]
    head: jax.Array


UNSTACKED_BYTES = 2**30
"""Language models up to this size are copied with layers unstacked; larger or deeper ones (UNSTACKED_LAYERS) scan."""
UNSTACKED_LAYERS = 32


def unstack_layers(graphdef, params) -> DecodeParams | None:
    """Unstack the layers and transpose the token table once, not at every token.

    On a CPU both are copies, for a small model as much work as the rest of a step. Returns None for a model that is too
    large to be held twice or too deep to be unrolled.
    """
    language = nnx.merge(graphdef, params).language
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(language)))
    return (
        None
        if size > UNSTACKED_BYTES or language.config.num_layers > UNSTACKED_LAYERS
        else _unstack_layers(graphdef, params)
    )


@partial(jax.jit, static_argnames=("graphdef",))
def _unstack_layers(graphdef, params) -> DecodeParams:
    model = nnx.merge(graphdef, params)
    layers = (
        jax.tree.map(lambda leaf, number=number: leaf[number], stack)
        for stack in map(nnx.state, model.language.stacks)
        for number in range(_depth(stack))
    )
    return DecodeParams(tuple(layers), model.head_kernel())


def _depth(stack: nnx.State) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def layers_and_head(model, decode_params: DecodeParams | None) -> tuple[list[nnx.Module] | None, jax.Array | None]:
    """Return the decoder's layers one by one and the LM head; None where they were not unstacked."""
    if decode_params is None:
        return None, None
    kinds = [nnx.graphdef(stack) for stack in model.language.stacks for _ in range(_depth(nnx.state(stack)))]
    return [nnx.merge(kind, state) for kind, state in zip(kinds, decode_params.layers, strict=True)], decode_params.head


@partial(jax.jit, static_argnames=("graphdef", "has_pictures"))
def prefill(graphdef, params, batch: Batch, *, has_pictures: bool) -> Prefilled:
    """Prefill R rows of prompts, padded at the end. Each prompt attends only to itself.

    Args:
      has_pictures: static; False skips the vision tower, and the batch's patches are not read.
    """
    model = nnx.merge(graphdef, params)
    if has_pictures:
        inputs_RTD, options = model.decoder_inputs(batch)
    else:
        inputs_RTD, options = model.language.embed(batch.tokens).astype(model.compute_dtype), {}
    return _read(model, batch, inputs_RTD, **options)


def _read(model, batch: Batch, inputs_RTD, **options) -> Prefilled:
    hidden_RTD, keys, values = model.language.read(
        inputs_RTD, batch.positions, batch.segment_ids, segment_lengths=batch.segment_lengths, **options
    )
    return Prefilled(keys=keys, values=values, hidden=hidden_RTD, tokens=batch.tokens)


@partial(jax.jit, static_argnames=("graphdef",))
def prefill_pictures(graphdef, params, batch: Batch) -> tuple[Prefilled, jax.Array]:
    """As `prefill` with pictures; also the decoder's inputs (R, T, D), which hold the visual tokens."""
    model = nnx.merge(graphdef, params)
    inputs_RTD, options = model.decoder_inputs(batch)
    return _read(model, batch, inputs_RTD, **options), inputs_RTD


@partial(jax.jit, static_argnames=("graphdef",))
def prefill_seen(graphdef, params, batch: Batch, visual_RTD, is_visual_RT) -> Prefilled:
    """As `prefill` where the visual tokens are known: those of the places that `is_visual_RT` marks."""
    model = nnx.merge(graphdef, params)
    tokens_RTD = model.language.embed(batch.tokens).astype(model.compute_dtype)
    return _read(model, batch, jnp.where(is_visual_RT[..., None], visual_RTD.astype(tokens_RTD.dtype), tokens_RTD))


@partial(jax.jit, static_argnames=("places",))
def cut(keys, values, row, end, length, places: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values (L, 1, places, ..) of the `length` tokens before place `end` of a row, at the last places; the
    places before them hold what nobody reads.
    """
    place_P = jnp.clip(end - places + jnp.arange(places), 0, keys.shape[2] - 1)
    own_P = jnp.arange(places) >= places - length

    def of(store):
        taken = jax.lax.dynamic_index_in_dim(store, row, 1)[:, :, place_P]
        return jnp.where(own_P.reshape(-1, *[1] * (store.ndim - 3)), taken, 0)

    return of(keys), of(values)


@partial(jax.jit, static_argnames=("graphdef",))
def prefill_after(graphdef, params, tokens_1S, positions_13T, segment_ids_1S, keys, values) -> Prefilled:
    """Prefill one prompt whose beginning was read before.

    Args:
      tokens_1S, segment_ids_1S: of P known places (padding, then the beginning) and T new ones (tokens, then padding);
        0 is padding.
      positions_13T: of the new ones. keys, values: (L, 1, P, ..) as `cut` gives them.
    """
    model = nnx.merge(graphdef, params)
    P = keys.shape[2]
    inputs_1TD = model.language.embed(tokens_1S[:, P:]).astype(model.compute_dtype)
    hidden_1TD, *new = model.language.read_after(
        inputs_1TD, positions_13T, segment_ids_1S[:, P:], keys, values, segment_ids_1S[:, :P]
    )
    joined = (jnp.concatenate([old.astype(own.dtype), own], 2) for old, own in zip((keys, values), new, strict=True))
    hidden_1SD = jnp.pad(hidden_1TD, ((0, 0), (P, 0), (0, 0)))
    return Prefilled(*joined, hidden=hidden_1SD, tokens=tokens_1S)


@partial(jax.jit, static_argnames=("graphdef",))
def last_logits(graphdef, params, prefilled: Prefilled, places: Places) -> tuple[jax.Array, jax.Array]:
    """Logits (N, V) float32 after the last token of each answer's prompt, and the tokens that occur in the prompt, (N,
    V) bool.
    """
    logits_NV = nnx.merge(graphdef, params).logits(prefilled.hidden[places.row, places.start + places.length - 1])
    N, T = places.row.shape[0], prefilled.tokens.shape[1]
    place_1T = jnp.arange(T)[None]
    own_NT = (place_1T >= places.start[:, None]) & (place_1T < (places.start + places.length)[:, None])
    counts_NV = (
        jnp.zeros((N, logits_NV.shape[-1]), jnp.int32)
        .at[jnp.arange(N)[:, None], prefilled.tokens[places.row]]
        .max(own_NT.astype(jnp.int32))
    )
    return logits_NV, counts_NV > 0


Alternatives = tuple[jax.Array, jax.Array]
"""Ids (.., A) int32 and log-probabilities (.., A) float32 of the A likeliest tokens; A is 0 or ALTERNATIVES."""


def alternatives_of(logits_BV, wanted: bool) -> Alternatives:
    """Most likely tokens under the model itself; empty arrays unless wanted."""
    if not wanted:
        nothing = jnp.zeros((*logits_BV.shape[:-1], 0))
        return nothing.astype(jnp.int32), nothing
    most = min(ALTERNATIVES, logits_BV.shape[-1])
    logits_BA, ids_BA = jax.lax.top_k(logits_BV, most)
    return ids_BA.astype(jnp.int32), logits_BA - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("alternatives",))
def first_tokens(
    logits_NV, seen_NV, settings: Settings, alternatives: bool = False, allowed_NV=None
) -> tuple[jax.Array, jax.Array, Alternatives]:
    """First token (N,) int32 of each answer, its log-probability (N,) float32 and, if wanted, the alternatives to it.

    A program of its own, because `admit` and `last_logits` are compiled for each bucket, and sampling code compiles
    slowly.
    """
    penalised_NV = sampling.apply_repetition_penalty(logits_NV, seen_NV, settings.penalty)
    penalised_NV = sampling.allow(penalised_NV, allowed_NV)
    token_N = sampling.choose(
        penalised_NV,
        keys_B2=settings.key,
        counts_B=jnp.zeros(logits_NV.shape[:1], jnp.int32),
        temperature_B=settings.temperature,
        top_k_B=settings.top_k,
        top_p_B=settings.top_p,
        min_p_B=settings.min_p,
    )
    return token_N, sampling.log_probability(logits_NV, token_N), alternatives_of(logits_NV, alternatives)


@partial(jax.jit, donate_argnames=("slots",))
def admit(slots: Slots, keys, values, places: Places, seen_NV, slot_N, token_N, settings: Settings, eos_E) -> Slots:
    """Put N answers with their first tokens into slots.

    Args:
      keys, values: (L, R, T, ..) of the prefilled rows. places: of each answer's prompt in them; several answers may
        share one (n samples).
      slot_N: slot of each answer; a number past the last slot drops the entry (padding).
    """
    # The prompt's last token goes just before the next write position. Positions before the prompt's first are never
    # read.
    S, T = slots.cache.places, keys.shape[2]
    ages_S = (slots.place - 1 - jnp.arange(S)) % S
    place_NS = jnp.clip((places.start + places.length - 1)[:, None] - ages_S[None], 0, T - 1)

    def of_answers(store):
        return store[:, places.row[:, None], place_NS]

    cache = slots.cache.replace_rows(slot_N, of_answers(keys), of_answers(values))
    return admitted(slots, cache, places, seen_NV, slot_N, token_N, settings, eos_E)


def admitted(slots: Slots, cache: Cache, places: Places, seen_NV, slot_N, token_N, settings: Settings, eos_E) -> Slots:
    """`slots` with a cache that already holds the prompts, and with N answers; arguments as of `admit`."""
    ended_N = (token_N[:, None] == eos_E[None]).any(-1) & ~settings.ignore_eos

    def put(old, new):
        return old.at[slot_N].set(new.astype(old.dtype), mode="drop")

    return dataclasses.replace(
        slots,
        cache=cache,
        token=put(slots.token, token_N),
        index=put(slots.index, places.length),
        position=put(slots.position, places.position),
        count=put(slots.count, jnp.ones_like(slot_N)),
        active=put(slots.active, ~ended_N & (settings.limit > 1)),
        seen=put(slots.seen, seen_NV.at[jnp.arange(token_N.shape[0]), token_N].set(True)),
        counts=put(slots.counts, jax.nn.one_hot(token_N, seen_NV.shape[-1], dtype=jnp.int32)),
        settings=jax.tree.map(put, slots.settings, settings),
    )


@partial(jax.jit, static_argnames=("graphdef", "alternatives"), donate_argnames=("slots",))
def decode(
    graphdef,
    params,
    decode_params: DecodeParams | None,
    slots: Slots,
    eos_E,
    steps,
    wanted,
    alternatives: bool = False,
    allowed_BV=None,
) -> tuple[Slots, jax.Array, jax.Array, Alternatives, jax.Array]:
    """Decode until each slot has `steps` new tokens, `wanted` of the active slots have finished, or none is active.

    Args:
      decode_params: from `unstack_layers`; None for slots whose cache is a stack.
      eos_E: (E,) int32, tokens that end an answer. steps: int32 scalar, at most CHUNK. wanted: int32 scalar, at least
        1.
      alternatives: static; also return the likeliest tokens of each step.
      allowed_BV: (B, V) bool, tokens that each slot may go on with; holds for one step. None: any.

    Returns:
      slots; tokens (CHUNK, B) int32, -1 where a slot gained none; log-probabilities (CHUNK, B) float32; alternatives
      (CHUNK, B, A); active (B,).
    """
    model = nnx.merge(graphdef, params)
    layers, head = layers_and_head(model, decode_params)
    B = slots.token.shape[0]
    at_start = jnp.sum(slots.active)
    # Rarely asked for, and a (B, V) table costs a small model a fifth of its step.
    penalises = jnp.any(
        (slots.settings.penalty != 1) | (slots.settings.presence != 0) | (slots.settings.frequency != 0)
    )

    def penalise(logits_BV, slots: Slots):
        logits_BV = sampling.apply_repetition_penalty(logits_BV, slots.seen, slots.settings.penalty)
        return sampling.apply_count_penalties(
            logits_BV, slots.counts, slots.settings.presence, slots.settings.frequency
        )

    def remember(slots: Slots, token_B):
        rows = jnp.arange(B)
        return slots.seen.at[rows, token_B].set(True), slots.counts.at[rows, token_B].add(
            slots.active.astype(jnp.int32)
        )

    def go_on(carry):
        step, slots, *_ = carry
        left = jnp.sum(slots.active)
        return (step < steps) & (left > 0) & (at_start - left < wanted)

    def one(carry):
        step, slots, tokens_CB, logprobs_CB, others_CBA = carry
        inputs_B1D = model.language.embed(slots.token[:, None]).astype(model.compute_dtype)
        positions_B31 = jnp.broadcast_to(slots.position[:, None, None], (B, 3, 1))
        hidden_B1D, cache = model.language.extend(
            inputs_B1D, positions_B31, slots.cache, slots.place, slots.index + 1, layers=layers
        )
        logits_BV = model.logits(hidden_B1D[:, 0], head)
        settings = slots.settings
        token_B = sampling.choose(
            sampling.allow(
                jax.lax.cond(penalises, penalise, lambda logits_BV, _: logits_BV, logits_BV, slots), allowed_BV
            ),
            keys_B2=settings.key,
            counts_B=slots.count,
            temperature_B=settings.temperature,
            top_k_B=settings.top_k,
            top_p_B=settings.top_p,
            min_p_B=settings.min_p,
        )
        logprob_B = sampling.log_probability(logits_BV, token_B)
        active_B = slots.active
        tokens_CB = tokens_CB.at[step].set(jnp.where(active_B, token_B, -1))
        logprobs_CB = logprobs_CB.at[step].set(logprob_B)
        others_CBA = jax.tree.map(
            lambda store, new: store.at[step].set(new), others_CBA, alternatives_of(logits_BV, alternatives)
        )
        ended_B = (token_B[:, None] == eos_E[None]).any(-1) & ~settings.ignore_eos
        grow_B = active_B.astype(jnp.int32)
        seen_BV, counts_BV = jax.lax.cond(
            penalises, remember, lambda slots, _: (slots.seen, slots.counts), slots, token_B
        )
        slots = Slots(
            cache=cache,
            place=(slots.place + 1) % cache.places,
            token=jnp.where(active_B, token_B, slots.token),
            index=slots.index + grow_B,
            position=slots.position + grow_B,
            count=slots.count + grow_B,
            active=active_B & ~ended_B & (slots.count + 1 < settings.limit),
            seen=seen_BV,
            counts=counts_BV,
            settings=settings,
        )
        return step + 1, slots, tokens_CB, logprobs_CB, others_CBA

    A = min(ALTERNATIVES, slots.seen.shape[-1]) if alternatives else 0
    others_CBA = jnp.zeros((CHUNK, B, A), jnp.int32), jnp.zeros((CHUNK, B, A), jnp.float32)
    start = (jnp.int32(0), slots, jnp.full((CHUNK, B), -1, jnp.int32), jnp.zeros((CHUNK, B), jnp.float32), others_CBA)
    _, slots, tokens_CB, logprobs_CB, others_CBA = jax.lax.while_loop(go_on, one, start)
    return slots, tokens_CB, logprobs_CB, others_CBA, slots.active


@partial(jax.jit, donate_argnames=("slots",))
def release(slots: Slots, keep_B) -> Slots:
    """Stop the slots where `keep_B` is False: the host saw a stop string, or the request was aborted."""
    return dataclasses.replace(slots, active=slots.active & keep_B)
