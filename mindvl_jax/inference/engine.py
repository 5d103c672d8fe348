"""Continuous batching: prompts wait, are prefilled in buckets, decode in slots, and free their slot as soon as they
end.

The engine handles tokens only; `generator.py` handles text, stop strings and image files.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.lru import ByteLimitedLRU
from mindvl_jax.inference import programs
from mindvl_jax.inference.buckets import Bucket, bucket_of, next_size, row_counts, rows_for
from mindvl_jax.inference.grammar import Matcher
from mindvl_jax.inference.placement import place_rows, row_groups
from mindvl_jax.inference.prefill import RowPlanner
from mindvl_jax.inference.prefix_cache import Entry, PrefixCache
from mindvl_jax.inference.programs import CHUNK
from mindvl_jax.inference.prompts import Prompt, pack_bucket, vision_of
from mindvl_jax.inference.request import Sampling
from mindvl_jax.inference.turns import Turns
from mindvl_jax.models.layers.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Delivery:
    """New tokens of one answer.

    Attributes:
      tokens, logprobs: equally long. alternatives: as `request.Answer.alternatives`, or empty.
      ended: `stop` or `length` once the answer is complete; `error` when its grammar outgrew the limits.
    """

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[tuple[tuple[int, float], ...]]
    ended: str | None


Watcher = Callable[[Delivery], bool]
"""Called with each delivery of an answer; True stops the answer."""


@dataclasses.dataclass(eq=False)
class _Running:
    """One waiting or running answer.

    Attributes:
      owner, priority, arrival, cost: as of `turns.Waiter`.
      beginning: (version of the prefix cache, what `Engine._known` found in it).
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    watcher: Watcher
    matcher: Matcher | None
    owner: str | None
    priority: int
    arrival: int
    cost: int
    produced: int = 0
    beginning: tuple[int, tuple[Entry, int, int] | None] | None = None


@dataclasses.dataclass(eq=False)
class _Reading:
    """A long prompt that is read piece by piece.

    Attributes:
      slot: kept free for it. length: tokens that were read. known: their keys and values, as `programs.cut` gives them.
    """

    running: _Running
    slot: int
    length: int
    known: tuple[jax.Array, jax.Array]


class Engine:
    """Slots of fixed size over one model.

    Args:
      model: a MindVL module; its parameters may be spread over a mesh.
      eos_ids: tokens that end an answer.
      slots: answers that decode together.
      context: cache positions of a slot, for the longest prompt plus answer.
      mesh: spreads the slots over its rows axes (data, fsdp) when their number divides; None: wherever the parameters
        are.
      programs: the module `programs` (XLA), the module `speculative`, or a `backends.BridgePrograms`.
      prefix_bytes: keys and values of prompts that are kept for prompts which begin in the same way; 0 keeps none. On
        one device, for decoders that can go on after known keys (`read_after`); others keep none. An eighth of it, on
        the host, for what the tower gave, where that is all that a picture adds to the decoder's inputs.
      prefill_chunk: prompts of more than twice as many tokens are read in pieces of so many, one a step, so that
        running answers go on in between; 0 reads them whole. Where `prefix_bytes` holds.
    """

    def __init__(
        self,
        model,
        *,
        eos_ids: Sequence[int],
        slots: int,
        context: int,
        mesh=None,
        programs=programs,
        prefix_bytes: int = 0,
        prefill_chunk: int = 0,
    ):
        self._programs = programs
        self.slots, self.context = slots, context
        self._graphdef, self._params = nnx.split(model)
        self._decode_params = programs.unstack_layers(self._graphdef, self._params)
        self._vision = vision_of(model)
        self._width, self._dtype = model.language.config.hidden_size, model.compute_dtype
        self._eos = jnp.asarray(list(eos_ids), jnp.int32)
        self._eos_set = frozenset(int(token) for token in eos_ids)
        self._mesh = mesh
        self._planner = RowPlanner(model, slots, row_groups(mesh))
        self._state = self._place(programs.new_slots(model, slots, context, unrolled=self._decode_params is not None))
        self._waiting: collections.deque[_Running] = collections.deque()
        self._running: list[_Running | None] = [None] * slots
        self._turns, self._arrivals = Turns(), itertools.count()
        can_go_on = mesh is None and hasattr(model.language, "read_after")
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes and can_go_on else None
        sees = hasattr(model.config, "vision") and type(model).decoder_inputs is LanguageModel.decoder_inputs
        # Visual tokens (G, D) on the host, by digest of a medium's pixels.
        self.pictures: ByteLimitedLRU[bytes, np.ndarray] | None = (
            ByteLimitedLRU(prefix_bytes // 8) if self.prefixes is not None and sees else None
        )
        self._shown: list[tuple[jax.Array, Sequence[Prompt], programs.Places]] = []
        self._piece = prefill_chunk if can_go_on else 0
        self._reading: _Reading | None = None
        self._rests: tuple[int, ...] = ()
        self.decoded_tokens = 0
        self.reused_tokens = 0
        self.reused_pictures = 0
        self.decode_steps = 0

    def _place(self, state: programs.Slots) -> programs.Slots:
        """Place free slots as the programs will return them: an uncommitted state would compile every program twice."""
        if self._mesh is not None:
            return place_rows(self._mesh, state, self.slots)
        devices = jax.tree.leaves(self._params)[0].devices()
        return jax.device_put(state, min(devices, key=lambda device: device.id))

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._running) or self._reading is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._reading is not None)

    @property
    def running(self) -> int:
        """Number of decoding answers."""
        return sum(running is not None for running in self._running)

    @property
    def parameters(self) -> nnx.State:
        return self._params

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens that were drafted ahead, and how many of them were accepted."""
        return self._programs.drafts(self._state)

    def fix(self, sizes: Sequence[tuple[Bucket, int]]) -> None:
        """Restrict prefill to these sizes (bucket, rows), so that nothing is compiled later; see `warm_up`."""
        self._planner.fix(sizes)
        # A rest of more than half a prompt is not worth a program of its own.
        texts = {bucket.tokens for bucket, _ in sizes if not bucket.patches}
        self._rests = tuple(sorted(tokens for tokens in texts if 2 * tokens <= self.context))
        self._piece = max((tokens for tokens in self._rests if tokens <= self._piece), default=0)

    def warm_up(self, prompt: Prompt, sizes: Sequence[tuple[Bucket, int]]) -> Iterator[tuple[int, int, str]]:
        """Compile all programs of these prompt sizes and of decoding, and `fix` the sizes.

        Yields (done, total, what) before each.

        Args:
          prompt: any small one without images.
        """
        self.fix(sizes)
        counts = row_counts(self.slots)
        rests = self._rests if self.prefixes is not None or self._piece else ()
        total = len(sizes) * len(counts) + len(rests) + 3
        done = 0
        for bucket, rows in sizes:
            for count in counts:
                yield done, total, f"prompts of {bucket.tokens} tokens and {bucket.patches} patches, {count} at a time"
                done += 1
                # Slot numbers past the last are dropped.
                self._read_rows(
                    [prompt], [[0]], [0] * count, bucket, rows, [self.slots] * count, self._settings([], count)
                )
        for tokens in rests:
            yield done, total, f"{tokens} tokens after a known beginning"
            done += 1
            self._compile_rest(prompt, tokens)
        V = self._state.seen.shape[-1]
        for alternatives, allowed in ((False, None), (True, None), (True, np.ones((self.slots, V), bool))):
            what = " by a grammar" if allowed is not None else " with alternatives" if alternatives else ""
            yield done, total, "decoding" + what
            done += 1
            self._decode(1, 1, alternatives, allowed)
        self._state = self._programs.release(self._state, np.ones((self.slots,), bool))
        jax.block_until_ready(self._state.token)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seeds: Sequence[int],
        watchers: Sequence[Watcher],
        matchers: Sequence[Matcher] = (),
        *,
        owner: str | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a prompt for `sampling.n` answers, each with its seed, its watcher and, if given, its matcher.

        Args:
          owner: who asks; owners take turns (see `turns.py`). priority: among the owner's prompts, the lowest first.

        Raises:
          UserError: the prompt does not fit the context; the programs cannot do what is asked for.
        """
        self.check(prompt)
        self._programs.check(sampling, constrained=bool(matchers))
        for seed, watcher, matcher in zip(seeds, watchers, matchers or [None] * len(seeds), strict=True):
            cost = prompt.tokens + min(sampling.max_new_tokens, self.context - prompt.tokens)
            self._waiting.append(
                _Running(prompt, sampling, seed, watcher, matcher, owner, priority, next(self._arrivals), cost)
            )
            self._turns.expect(self._waiting[-1])

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that can never be prefilled.

        Raises:
          UserError: longer than the context, or than every size that was fixed.
        """
        if prompt.tokens > self.context:
            raise UserError(
                f"The prompt of {prompt.id or 'a request'} has {prompt.tokens} tokens ({prompt.patches // 4} "
                f"of images) but the context holds {self.context}. "
                "Use smaller images (--max-pixels), a shorter prompt, or a larger context"
            )
        if not self._planner.holds([prompt]):
            raise UserError(
                f"The prompt has {prompt.tokens} tokens, {prompt.patches} patches and "
                f"{len(prompt.example.image_lengths)} images, more than any size that was compiled"
            )

    def abort(self, watchers: Sequence[Watcher]) -> None:
        """Drop the answers of these watchers, waiting or decoding; their slots are free at once and nothing more is
        delivered.
        """
        gone = set(map(id, watchers))
        self._waiting = collections.deque(running for running in self._waiting if id(running.watcher) not in gone)
        if self._reading is not None and id(self._reading.running.watcher) in gone:
            self._reading = None
        self._release(
            [slot for slot, running in enumerate(self._running) if running is not None and id(running.watcher) in gone]
        )

    def load(self, params) -> None:
        """Replace the parameters, an nnx.State of the model's structure. Running answers continue with the new ones.

        Raises:
          ValueError: another structure, shapes or dtypes than the model's.
        """

        def kind(tree):
            return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

        if kind(params) != kind(self._params):
            raise ValueError("the new parameters have another structure, shapes or dtypes than the model's")
        self._params = params
        self._decode_params = self._programs.unstack_layers(self._graphdef, params)
        if self.prefixes is not None:
            self.prefixes.clear()
        self._shown.clear()
        if self.pictures is not None:
            self.pictures.clear()
        if self._reading is not None:  # not half by the old weights
            self._waiting.appendleft(self._reading.running)
            self._reading = None

    def _release(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        keep = np.ones((self.slots,), bool)
        keep[list(slots)] = False
        self._state = self._programs.release(self._state, keep)
        for slot in slots:
            self._running[slot] = None

    def step(self, *, chunk: int = CHUNK, eager: bool = True) -> None:
        """Admit prompts that fit, then decode up to `chunk` tokens in each slot and deliver them to the watchers.

        Args:
          eager: admit as soon as any slot is free; False waits until a quarter of the slots is free, which wastes less
            on prefill when nobody watches.
        """
        admitted = self._admit(1 if eager else max(1, self.slots // 4))
        active = [running is not None for running in self._running]
        if not any(active):
            self._keep_pictures()
            return
        wanted = sum(active)
        if self._waiting:
            wanted = 1 if eager else max(1, min(wanted, self.slots // 4))
        alternatives = any(running is not None and running.sampling.top_logprobs for running in self._running)
        allowed_BV = None
        if any(running is not None and running.matcher for running in self._running):
            # What may come next depends on the token before, which only the host's matchers know how to read: one token
            # at a time, also for the slots beside.
            chunk, alternatives = 1, True
            for slots, tokens, *_ in admitted:
                for slot, token in zip(slots, np.asarray(tokens)):
                    self._accept(slot, [token])
            allowed_BV = self._allowed(self._running)
        tokens_CB, logprobs_CB, others_CBA, active_B = self._decode(chunk, wanted, alternatives, allowed_BV)
        # Fetch the first tokens only now: admission and decoding are dispatched without a synchronisation between them.
        firsts = {}
        for slots, tokens, logprobs, others in admitted:
            ids_NA, values_NA = map(np.asarray, others)
            for slot, token, logprob, ids, values in zip(
                slots, np.asarray(tokens), np.asarray(logprobs), ids_NA, values_NA
            ):
                firsts[slot] = int(token), float(logprob), _pairs(ids, values)
        self._deliver(
            firsts,
            np.asarray(tokens_CB),
            np.asarray(logprobs_CB),
            jax.tree.map(np.asarray, others_CBA),
            np.asarray(active_B),
        )
        self._keep_pictures()

    def _accept(self, slot: int, tokens: Sequence[int]) -> None:
        running = self._running[slot]
        if running is not None and running.matcher is not None:
            running.matcher.accept(tokens)

    def _allowed(self, answers: Sequence[_Running | None], pad: int = 0) -> np.ndarray:
        """(B, V) bool: the tokens that each answer may go on with."""
        allowed = np.ones((len(answers) + pad, self._state.seen.shape[-1]), bool)
        for row, running in enumerate(answers):
            if running is not None and running.matcher is not None and not running.matcher.failed:
                allowed[row] = running.matcher.allowed()
        return allowed

    def _decode(self, chunk: int, wanted: int, alternatives: bool, allowed_BV: np.ndarray | None = None):
        self._state, *results = self._programs.decode(
            self._graphdef,
            self._params,
            self._decode_params,
            self._state,
            self._eos,
            np.int32(min(chunk, CHUNK)),
            np.int32(wanted),
            alternatives,
            allowed_BV,
        )
        return results

    def _deliver(
        self, firsts: dict[int, tuple[int, float, tuple]], tokens_CB, logprobs_CB, others_CBA, active_B
    ) -> None:
        stopped = []
        gained_CB = tokens_CB >= 0
        self.decode_steps += int(gained_CB.any(1).sum())
        for slot, running in enumerate(self._running):
            if running is None:
                continue
            gained = gained_CB[:, slot]
            tokens = tokens_CB[gained, slot].tolist()
            logprobs = logprobs_CB[gained, slot].tolist()
            self._accept(slot, tokens)
            most = running.sampling.top_logprobs
            others = (
                [_pairs(ids, values) for ids, values in zip(*(store[gained, slot] for store in others_CBA))]
                if most
                else []
            )
            if slot in firsts:
                for store, first in zip((tokens, logprobs, others), firsts[slot], strict=True):
                    store.insert(0, first)
            others = [pairs[:most] for pairs in others] if most else []
            running.produced += len(tokens)
            self.decoded_tokens += len(tokens)
            ended = None
            if not active_B[slot]:
                ended = (
                    "stop" if tokens and tokens[-1] in self._eos_set and not running.sampling.ignore_eos else "length"
                )
            if ended is None and running.matcher is not None and running.matcher.failed:
                ended = "error"
                stopped.append(slot)
            if running.watcher(Delivery(tokens, logprobs, others, ended)) and ended is None:
                stopped.append(slot)
            if ended:
                self._running[slot] = None
        self._release(stopped)

    def _admit(self, least_free: int) -> list[tuple[list[int], jax.Array, jax.Array, programs.Alternatives]]:
        """Prefill waiting prompts into free slots, one bucket after another."""
        admitted = []
        free = [slot for slot, running in enumerate(self._running) if running is None]
        if self._reading is not None:
            free.remove(slot := self._reading.slot)
            if (first := self._read_piece()) is not None:
                admitted.append(([slot], *first))
        if len(free) < min(least_free, len(self._waiting)):
            return admitted
        self._waiting = collections.deque(self._turns.order(self._waiting))
        aside: list[_Running] = []  # long prompts, of which one is read at a time
        while free and self._waiting:
            if self._reading is not None and self._is_long(self._waiting[0].prompt):
                aside.append(self._waiting.popleft())
                continue
            # Of those alone whose turn it is now: nobody is passed by.
            soon = itertools.islice(self._waiting, len(free))
            known = ((running, found) for running in soon if (found := self._known(running)) is not None)
            running, found = next(known, (self._waiting[0], None))
            if found is None and not self._is_long(running.prompt):
                group = self._next_group(len(free))
                slots, free = free[: len(group)], free[len(group) :]
                admitted.append((slots, *self._read(group, slots)))
                continue
            self._waiting.remove(running)
            self._turns.charge(running)
            slot, *free = free
            if found is None:
                self._begin(running, slot)
            elif self._reading is None and self._piece and running.prompt.tokens - found[1] > 2 * self._piece:
                entry, length, _ = found
                self._reading = _Reading(running, slot, length, self._cut(entry, length))
                self.reused_tokens += length
            else:
                admitted.append(([slot], *self._read_after(running, slot, *found)))
        self._waiting.extendleft(reversed(aside))
        return admitted

    def _next_group(self, most: int) -> list[_Running]:
        """Return the longest waiting prompt and the ones that fit into its bucket, else in order of arrival."""
        bucket: Bucket = self._waiting[0].prompt.bucket
        group, passed = [], []
        while self._waiting and len(group) < most and len(passed) < 4 * self.slots:
            running = self._waiting.popleft()
            fits = bucket.holds(running.prompt.bucket) and not self._is_long(running.prompt)
            (group if fits else passed).append(running)
        if not self._planner.free:  # sizes are fixed: prompts that do not fit together wait for the next call
            while len(group) > 1 and not self._planner.holds([running.prompt for running in group]):
                passed.insert(0, group.pop())
        self._waiting.extendleft(reversed(passed))
        for running in group:
            self._turns.charge(running)
        return group

    def _read(self, group: list[_Running], slots: list[int]) -> tuple[jax.Array, jax.Array, programs.Alternatives]:
        prompts: list[Prompt] = []
        prompt_of: list[int] = []
        for running in group:  # answers of one prompt share its prefill
            if not prompts or prompts[-1] is not running.prompt:
                prompts.append(running.prompt)
            prompt_of.append(len(prompts) - 1)
        seen = self._are_seen(prompts)
        bucket, count, rows = self._planner([prompt.without_pixels for prompt in prompts] if seen else prompts)
        pad = rows_for(len(group), self.slots) - len(group)
        constrained = any(running.matcher for running in group)
        alternatives = constrained or any(running.sampling.top_logprobs for running in group)
        slot_N = slots + [self.slots] * pad
        first = self._read_rows(
            prompts,
            rows,
            prompt_of + [0] * pad,
            bucket,
            count,
            slot_N,
            self._settings(group, pad),
            alternatives,
            self._allowed(group, pad) if constrained else None,
            seen=seen,
        )
        for running, slot in zip(group, slots):
            self._running[slot] = running
        return first

    def _read_rows(
        self,
        prompts,
        rows,
        prompt_of: Sequence[int],
        bucket: Bucket,
        count: int,
        slots: Sequence[int],
        settings,
        alternatives: bool | None = None,
        allowed_NV: np.ndarray | None = None,
        *,
        seen: bool = False,
    ):
        """Prefill rows of prompts and put their answers into slots; returns the first tokens.

        Args:
          rows: indexes of the prompts of each row. prompt_of, slots: of each answer. alternatives: None compiles all
            programs. allowed_NV: first tokens that each answer may have; None: any. seen: all their pictures are
            cached.
        """
        packed = [prompt.without_pixels for prompt in prompts] if seen else prompts
        batch = pack_bucket([[packed[index] for index in row] for row in rows], bucket, count, self._vision)
        batch = place_rows(self._mesh, batch, batch.tokens.shape[0])
        own = _places(prompts, rows, range(len(prompts)))
        if seen or (self.pictures is not None and alternatives is None and not bucket.patches):
            prefilled = self._prefill_seen(batch, prompts, own)
        if not seen:
            prefilled = self._prefill(batch, prompts, own, has_pictures=bool(bucket.patches))
        first = self._start(prefilled, _places(prompts, rows, prompt_of), slots, settings, alternatives, allowed_NV)
        self._keep(prefilled, prompts, own, compile=alternatives is None)
        return first

    # --- pictures that were seen before ---

    def _are_seen(self, prompts: Sequence[Prompt]) -> bool:
        """Whether there are pictures, and the tower's output of all of them is known."""
        if self.pictures is None or not any(prompt.patches for prompt in prompts):
            return False
        media = [prompt.media for prompt in prompts]
        return None not in media and all(digest in self.pictures for digest, _ in itertools.chain(*media))

    def _prefill_seen(self, batch, prompts: Sequence[Prompt], places: programs.Places) -> programs.Prefilled:
        R, T = batch.tokens.shape
        visual_RTD = np.zeros((R, T, self._width), self._dtype)
        is_visual_RT = np.zeros((R, T), bool)
        for prompt, row, start in zip(prompts, places.row, places.start):
            for digest, own in prompt.media:
                visual_RTD[row, start + own], is_visual_RT[row, start + own] = self.pictures.get(digest), True
                self.reused_pictures += 1
        return self._programs.prefill_seen(self._graphdef, self._params, batch, visual_RTD, is_visual_RT)

    def _prefill(self, batch, prompts, places: programs.Places, *, has_pictures: bool) -> programs.Prefilled:
        """Read prompts whole, and note which pictures were seen."""
        if self.pictures is None or not has_pictures:
            return self._programs.prefill(self._graphdef, self._params, batch, has_pictures=has_pictures)
        prefilled, inputs = self._programs.prefill_pictures(self._graphdef, self._params, batch)
        self._shown.append((inputs, prompts, places))
        return prefilled

    def _keep_pictures(self) -> None:
        """Fetch what the tower gave: only now, as `step` has waited for the device anyway."""
        for inputs, prompts, places in self._shown:
            new = [
                (digest, row, start + own)
                for prompt, row, start in zip(prompts, places.row, places.start)
                for digest, own in prompt.media or ()
                if digest not in self.pictures
            ]
            if new:
                inputs_RTD = np.asarray(inputs)
                for digest, row, own in new:
                    self.pictures.add(digest, (visual := inputs_RTD[row, own]), visual.nbytes)
        self._shown.clear()

    def _start(self, prefilled: programs.Prefilled, places, slots, settings, alternatives, allowed_NV):
        """Put answers to prefilled prompts into slots; arguments and result as of `_read_rows`."""
        logits, seen = self._programs.last_logits(self._graphdef, self._params, prefilled, places)
        if alternatives is None:
            self._programs.first_tokens(logits, seen, settings, True)
            self._programs.first_tokens(logits, seen, settings, True, np.ones(logits.shape, bool))
        first = self._programs.first_tokens(logits, seen, settings, bool(alternatives), allowed_NV)
        self._state = self._programs.admit(
            self._state,
            prefilled.keys,
            prefilled.values,
            places,
            seen,
            np.asarray(slots, np.int32),
            first[0],
            settings,
            self._eos,
        )
        return first

    # --- prompts that begin as one before ---

    def _known(self, running: _Running) -> tuple[Entry, int, int] | None:
        """(entry, tokens in common, size for the rest) where going on after a known beginning is worth it."""
        if self.prefixes is None:
            return None
        if running.beginning is None or running.beginning[0] != self.prefixes.version:
            running.beginning = self.prefixes.version, self._look_up(running.prompt)
        return running.beginning[1]

    def _look_up(self, prompt: Prompt) -> tuple[Entry, int, int] | None:
        if (found := self.prefixes.longest(prompt.identity)) is None:
            return None
        entry, length = found
        rest = prompt.tokens - length
        size = next((size for size in self._rests if size >= rest), None if self._rests else next_size(rest, 32))
        # Images of the rest would want the tower.
        if size is None or 2 * size > prompt.tokens or (prompt.example.visual_index[length:] >= 0).any():
            return None
        return entry, length, size

    def _read_after(self, running: _Running, slot: int, entry: Entry, length: int, size: int):
        """Read the rest of a prompt and put its answer into a slot; returns as `_read`."""
        first = self._start_after(running, slot, length, size, self._cut(entry, length))
        self.reused_tokens += length
        return first

    def _cut(self, entry: Entry, length: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of an entry's first tokens."""
        end = np.int32(entry.keys.shape[2] - entry.tokens + length)
        return self._programs.cut(entry.keys, entry.values, np.int32(0), end, np.int32(length), self.context)

    def _start_after(self, running: _Running, slot: int, length: int, size: int, known):
        """Read the last `size` places of a prompt and start its answer in a slot."""
        pad, constrained = rows_for(1, self.slots) - 1, running.matcher is not None
        first = self._go_on(
            running.prompt,
            length,
            size,
            known,
            [slot] + [self.slots] * pad,
            self._settings([running], pad),
            constrained or bool(running.sampling.top_logprobs),
            self._allowed([running], pad) if constrained else None,
        )
        self._running[slot] = running
        return first

    def _go_on(self, prompt: Prompt, length: int, size: int, known, slots, settings, alternatives, allowed_NV):
        prefilled = self._prefill_after(prompt, length, prompt.tokens - length, size, known)
        place = _places([prompt], [[0]], [0] * len(slots))
        place = dataclasses.replace(place, start=place.start + np.int32(self.context - length))
        first = self._start(prefilled, place, slots, settings, alternatives, allowed_NV)
        self._keep(prefilled, [prompt], place, compile=alternatives is None)
        return first

    def _prefill_after(self, prompt: Prompt, length: int, rest: int, size: int, known) -> programs.Prefilled:
        """Read `rest` tokens of a prompt, in `size` places, behind the `length` known ones."""
        P, example = self.context, prompt.example
        tokens, ids = np.zeros((1, P + size), np.int32), np.zeros((1, P + size), np.int32)
        positions = np.zeros((1, 3, size), np.int32)
        tokens[0, P - length : P + rest], ids[0, P - length : P + rest] = example.tokens[: length + rest], 1
        positions[0, :, :rest] = example.positions[:, length : length + rest]
        return self._programs.prefill_after(self._graphdef, self._params, tokens, positions, ids, *known)

    # --- long prompts, piece by piece ---

    def _is_long(self, prompt: Prompt) -> bool:
        return bool(self._piece) and prompt.tokens - self._first_piece(prompt) > self._piece

    def _first_piece(self, prompt: Prompt) -> int:
        """Tokens of the piece that is read first: all images are in it, as it alone runs the tower."""
        visual = np.flatnonzero(prompt.example.visual_index >= 0)
        return max(self._piece, int(visual[-1]) + 1 if len(visual) else 0)

    def _begin(self, running: _Running, slot: int) -> None:
        """Read the first piece of a long prompt."""
        length, example = self._first_piece(running.prompt), running.prompt.example
        cut = {
            name: getattr(example, name)[..., :length] for name in ("tokens", "targets", "loss_weights", "positions")
        }
        part = dataclasses.replace(example, **cut, visual_index=example.visual_index[:length])
        prompt = Prompt(running.prompt.id, part, bucket_of(length, part.patches, len(part.image_lengths)))
        bucket, count, _ = self._planner([prompt])
        batch = pack_bucket([[prompt]], bucket, count, self._vision)
        places = _places([prompt], [[0]], [0])
        read = self._prefill(batch, [prompt], places, has_pictures=bool(bucket.patches))
        end = np.int32(length)
        known = self._programs.cut(read.keys, read.values, np.int32(0), end, end, self.context)
        self._reading = _Reading(running, slot, length, known)

    def _read_piece(self):
        """Read one more piece of the long prompt; with the last one its answer starts, and the result is that of
        `_read`, else None.
        """
        reading = self._reading
        rest = reading.running.prompt.tokens - reading.length
        if rest <= self._piece:
            size = next((size for size in self._rests if size >= rest), self._piece)
            self._reading = None
            return self._start_after(reading.running, reading.slot, reading.length, size, reading.known)
        read = self._prefill_after(reading.running.prompt, reading.length, self._piece, self._piece, reading.known)
        reading.length += self._piece
        end, length = np.int32(self.context + self._piece), np.int32(reading.length)
        reading.known = self._programs.cut(read.keys, read.values, np.int32(0), end, length, self.context)
        return None

    def _keep(self, prefilled: programs.Prefilled, prompts: Sequence[Prompt], places, *, compile: bool) -> None:
        """Keep keys and values of prompts that may be the beginning of others."""
        if self.prefixes is None:
            return
        for prompt, row, start, length in zip(prompts, places.row, places.start, places.length):
            if compile or self.prefixes.wants(prompt.identity):
                end = np.int32(start + length)
                kept = self._programs.cut(prefilled.keys, prefilled.values, row, end, length, self.context)
                if not compile:
                    self.prefixes.add(Entry(prompt.identity, *kept))

    def _compile_rest(self, prompt: Prompt, size: int) -> None:
        """Compile what `_read_after` runs for a rest of this size."""
        bucket, count, _ = self._planner([prompt])
        batch = pack_bucket([[prompt]], bucket, count, self._vision)
        read = self._programs.prefill(self._graphdef, self._params, batch, has_pictures=bool(bucket.patches))
        one, pad = np.int32(1), rows_for(1, self.slots)
        known = self._programs.cut(read.keys, read.values, np.int32(0), one, one, self.context)
        known = self._programs.cut(*known, np.int32(0), np.int32(self.context), one, self.context)
        # Slot numbers past the last are dropped.
        self._go_on(prompt, prompt.tokens - 1, size, known, [self.slots] * pad, self._settings([], pad), None, None)

    def _settings(self, group: list[_Running], pad: int) -> programs.Settings:
        def column(value: Callable[[_Running], object], kind, rest):
            return np.asarray([value(running) for running in group] + [rest] * pad, kind)

        # The last token of an answer is never written to the cache, so an answer has one token more than its cache
        # positions.
        def limit(running):
            return min(running.sampling.max_new_tokens, self.context - running.prompt.tokens + 1)

        return programs.Settings(
            temperature=column(lambda r: r.sampling.temperature, np.float32, 0),
            top_k=column(lambda r: r.sampling.top_k, np.int32, 0),
            top_p=column(lambda r: r.sampling.top_p, np.float32, 1),
            min_p=column(lambda r: r.sampling.min_p, np.float32, 0),
            penalty=column(lambda r: r.sampling.repetition_penalty, np.float32, 1),
            presence=column(lambda r: r.sampling.presence_penalty, np.float32, 0),
            frequency=column(lambda r: r.sampling.frequency_penalty, np.float32, 0),
            limit=column(limit, np.int32, 1),
            ignore_eos=column(lambda r: r.sampling.ignore_eos, bool, False),
            key=np.asarray([_key(running.seed) for running in group] + [(0, 0)] * pad, np.uint32),
        )


def _places(prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], prompt_of: Sequence[int]) -> programs.Places:
    """Rows and offsets of the answers' prompts."""
    found: dict[int, tuple[int, int, int, int]] = {}
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            length = prompts[index].tokens
            found[index] = (number, start, length, int(prompts[index].example.positions.max()) + 1)
            start += length
    row, start, length, position = np.asarray([found[index] for index in prompt_of], np.int32).T.copy()
    return programs.Places(row=row, start=start, length=length, position=position)


def _pairs(ids, values) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist()))


def _key(seed: int) -> tuple[int, int]:
    """Threefry key of a seed, as jax.random.PRNGKey makes it, without a device call for each request."""
    return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF
