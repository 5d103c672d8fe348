"""Device programs of greedy generation with tokens drafted ahead by the model's first MTP head, else as `programs`.

    Generator(opened, programs=speculative)

A step drafts one token and runs the decoder over the newest token and the draft. The decoder's choice after the newest
token is always taken; if it is the draft, so is the choice after that, which makes two tokens of one pass. So the
tokens are those of plain greedy decoding, up to the rounding of a pass over two tokens instead of one.

Rows gain different numbers of tokens, so each row has its own place in the cache: slot i holds its token i.

Legend: B slots, N admitted answers, R prompt rows, T prompt positions, S cache positions, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference import sampling
from mindvl_jax.inference.placement import mesh_of
from mindvl_jax.inference.programs import (
    ALTERNATIVES,
    CHUNK,
    DecodeParams,
    Places,
    Prefilled,
    Settings,
    Slots,
    admitted,
    alternatives_of,
    empty_slots,
    first_tokens,
    last_logits,
    layers_and_head,
    release,
    unstack_layers,
)
from mindvl_jax.inference.request import Sampling
from mindvl_jax.models.layers.cache import LatentCache
from mindvl_jax.models.vision_language.batch import Batch

__all__ = [
    "admit", "check", "decode", "drafts", "first_tokens", "last_logits", "new_slots", "prefill", "release",
    "unstack_layers",
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculativeSlots(Slots):
    """As `Slots`, of whose fields `place` means nothing here.

    The head has yet to read the last one or two positions of the cache: it needs the tokens after them, which were
    chosen last.

    Attributes:
      ahead: (B, 2) int32, tokens after these positions. hidden: (B, 2, D), hidden states there.
      fresh: (B,) int32, how many they are, 1 or 2.
      drafted, accepted: int32 scalars, tokens that were drafted where a second token could be taken, and taken.
    """

    ahead: jax.Array
    hidden: jax.Array
    fresh: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def check(settings: Sampling, *, constrained: bool) -> None:
    """Refuse what does not choose the likeliest token each time.

    Raises:
      UserError: with what it is.
    """
    problems = []
    if settings.temperature:
        problems.append(f"temperature {settings.temperature:g}")
    for name, neutral in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
        if getattr(settings, name) != neutral:
            problems.append(f"{name} {getattr(settings, name):g}")
    if constrained:
        problems.append("a grammar")
    if problems:
        raise UserError(
            f"speculative decoding is greedy and cannot serve a request with {', '.join(problems)}; leave it out, or "
            "decode without --speculative"
        )


def new_slots(model, slots: int, context: int, *, unrolled: bool) -> SpeculativeSlots:
    """Free slots over an empty cache of `context` positions and one for the draft behind the last.

    Raises:
      UserError: a model without MTP heads, or spread over several devices.
    """
    config = model.language.config
    if not getattr(config, "mtp_layers", 0):
        raise UserError("speculative decoding needs a model with an MTP head (DeepSeek-V3, model.text.mtp_layers: 1)")
    if mesh_of(model) is not None:
        raise UserError("speculative decoding runs on one device; leave --mesh or --speculative out")
    cache = LatentCache.empty(config, slots, context + 1, model.compute_dtype, unrolled=unrolled, mtp=True)
    plain = empty_slots(cache, slots, config.vocab_size)
    return SpeculativeSlots(
        **{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)},
        ahead=jnp.zeros((slots, 2), jnp.int32),
        hidden=jnp.zeros((slots, 2, config.hidden_size), model.compute_dtype),
        fresh=jnp.ones((slots,), jnp.int32),
        drafted=jnp.int32(0),
        accepted=jnp.int32(0),
    )


def drafts(slots: SpeculativeSlots) -> tuple[int, int]:
    """Tokens that were drafted where two could be taken, and how many of them were accepted."""
    return int(slots.drafted), int(slots.accepted)


@partial(jax.jit, static_argnames=("graphdef", "has_pictures"))
def prefill(graphdef, params, batch: Batch, *, has_pictures: bool) -> Prefilled:
    """As `programs.prefill`; `keys` are latents and `values` (shared keys, hidden states), both of one layer more."""
    model = nnx.merge(graphdef, params)
    if has_pictures:
        inputs_RTD, options = model.decoder_inputs(batch)
    else:
        inputs_RTD, options = model.language.embed(batch.tokens).astype(model.compute_dtype), {}
    hidden_RTD, latents, shared = model.language.read_ahead(
        inputs_RTD, batch.positions, batch.segment_ids, segment_lengths=batch.segment_lengths, **options
    )
    return Prefilled(keys=latents, values=(shared, hidden_RTD), hidden=hidden_RTD, tokens=batch.tokens)


@partial(jax.jit, donate_argnames=("slots",))
def admit(
    slots: SpeculativeSlots, keys, values, places: Places, seen_NV, slot_N, token_N, settings: Settings, eos_E
) -> SpeculativeSlots:
    """As `programs.admit`."""
    shared, hidden_RTD = values
    place_NS = jnp.clip(places.start[:, None] + jnp.arange(slots.cache.places), 0, keys.shape[2] - 1)
    cache = slots.cache.replace_rows(
        slot_N, keys[:, places.row[:, None], place_NS], shared[:, places.row[:, None], place_NS]
    )
    last_ND = hidden_RTD[places.row, places.start + places.length - 1]
    slots = admitted(slots, cache, places, seen_NV, slot_N, token_N, settings, eos_E)
    return dataclasses.replace(
        slots,
        ahead=slots.ahead.at[slot_N, 0].set(token_N, mode="drop"),
        hidden=slots.hidden.at[slot_N, 0].set(last_ND.astype(slots.hidden.dtype), mode="drop"),
        fresh=slots.fresh.at[slot_N].set(1, mode="drop"),
    )


@partial(jax.jit, static_argnames=("graphdef", "alternatives"), donate_argnames=("slots",))
def decode(
    graphdef,
    params,
    decode_params: DecodeParams | None,
    slots: SpeculativeSlots,
    eos_E,
    steps,
    wanted,
    alternatives: bool = False,
    allowed_BV=None,
):
    """As `programs.decode`; a slot gains one or two tokens a pass, so at least half of `steps`, and at most one more.

    Args:
      allowed_BV: not read; requests with a grammar are refused before.
    """
    model = nnx.merge(graphdef, params)
    layers, head = layers_and_head(model, decode_params)
    at_start = jnp.sum(slots.active)

    def go_on(carry):
        step, slots, *_ = carry
        left = jnp.sum(slots.active)
        return (step < (steps + 1) // 2) & (left > 0) & (at_start - left < wanted)

    def one(carry):
        step, slots, *results = carry
        slots, new, logits_B2V = _pass(model, layers, head, slots, eos_E)
        tokens_2B = new.T
        logprobs_2B = jax.vmap(sampling.log_probability, (1, 1))(logits_B2V, jnp.maximum(new, 0))
        others = jax.tree.map(lambda x: x.swapaxes(0, 1), alternatives_of(logits_B2V, alternatives))
        results = jax.tree.map(
            lambda store, rows: jax.lax.dynamic_update_slice_in_dim(store, rows, 2 * step, 0),
            tuple(results),
            (tokens_2B, logprobs_2B, others),
        )
        return step + 1, slots, *results

    B, A = slots.token.shape[0], min(ALTERNATIVES, slots.seen.shape[-1]) if alternatives else 0
    others = jnp.zeros((CHUNK, B, A), jnp.int32), jnp.zeros((CHUNK, B, A), jnp.float32)
    start = (jnp.int32(0), slots, jnp.full((CHUNK, B), -1, jnp.int32), jnp.zeros((CHUNK, B), jnp.float32), others)
    _, slots, tokens_CB, logprobs_CB, others = jax.lax.while_loop(go_on, one, start)
    return slots, tokens_CB, logprobs_CB, others, slots.active


def _pass(model, layers, head, slots: SpeculativeSlots, eos_E) -> tuple[SpeculativeSlots, jax.Array, jax.Array]:
    """Draft, verify, take -> slots, new tokens (B, 2) with -1 for none, logits (B, 2, V) that they were chosen by."""
    language, two, settings = model.language, jnp.arange(2), slots.settings

    def embed(tokens_B2):
        return language.embed(tokens_B2).astype(model.compute_dtype)

    def rotary(first_B):
        return jnp.broadcast_to(first_B[:, None, None] + two, (first_B.shape[0], 3, 2))

    with jax.named_scope("draft"):
        hidden_B2D, cache = language.draft_at(
            embed(slots.ahead),
            slots.hidden,
            rotary(slots.position - slots.fresh),
            slots.cache,
            (slots.index - slots.fresh)[:, None] + two,
        )
        last_BD = jnp.take_along_axis(hidden_B2D, (slots.fresh - 1)[:, None, None], 1)[:, 0]
        draft_B = sampling.likeliest(model.logits(last_BD, head))
    hidden_B2D, cache = language.extend_at(
        embed(jnp.stack([slots.token, draft_B], 1)),
        rotary(slots.position),
        cache,
        slots.index[:, None] + two,
        layers=layers,
    )
    logits_B2V = model.logits(hidden_B2D, head)
    chosen_B2 = sampling.likeliest(logits_B2V)

    ends_B2 = (chosen_B2[..., None] == eos_E).any(-1) & ~settings.ignore_eos[:, None]
    could_B = slots.active & ~ends_B2[:, 0] & (slots.count + 1 < settings.limit)
    both_B = could_B & (chosen_B2[:, 0] == draft_B)
    gain_B = slots.active.astype(jnp.int32) + both_B
    newest_B = jnp.where(both_B, chosen_B2[:, 1], chosen_B2[:, 0])
    ended_B = ends_B2[:, 0] | (both_B & ends_B2[:, 1])
    slots = dataclasses.replace(
        slots,
        cache=cache,
        token=jnp.where(slots.active, newest_B, slots.token),
        index=slots.index + gain_B,
        position=slots.position + gain_B,
        count=slots.count + gain_B,
        active=slots.active & ~ended_B & (slots.count + gain_B < settings.limit),
        ahead=chosen_B2,
        hidden=hidden_B2D.astype(slots.hidden.dtype),
        fresh=1 + both_B.astype(jnp.int32),
        drafted=slots.drafted + jnp.sum(could_B),
        accepted=slots.accepted + jnp.sum(both_B),
    )
    taken_B2 = two < gain_B[:, None]
    return slots, jnp.where(taken_B2, chosen_B2, -1), logits_B2V
