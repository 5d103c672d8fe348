"""Check a data set before training: kept and skipped samples with reasons, duplicates, lengths, examples to look
at.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from mindvl_jax.data.media.files import read_bytes
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.sample import Sample, SampleError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.vision_language.example import Example, ExampleEncoder

SHOWN = 24  # samples of the contact sheet
LISTED = 200  # skipped samples and duplicates written out


@dataclasses.dataclass
class SourceFindings:
    """Findings of one source. Lists stop at LISTED entries, counts do not.

    Attributes:
      tokens, learned, patches: of each kept sample.
      media: images and videos of each kept sample.
      skipped: (id, where, reason, message).
      reasons: skipped samples by reason.
      duplicates: (id, where, what it repeats).
      shown: kept samples for the contact sheet, evenly spread.
    """

    name: str
    path: str
    records: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    learned: list[int] = dataclasses.field(default_factory=list)
    patches: list[int] = dataclasses.field(default_factory=list)
    media: list[int] = dataclasses.field(default_factory=list)
    truncated: int = 0
    shrunk: int = 0
    skipped: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    duplicates: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    duplicate_count: int = 0
    tasks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    shown: list[tuple[Sample, Example]] = dataclasses.field(default_factory=list)

    @property
    def kept(self) -> int:
        return len(self.tokens)

    @property
    def patches_per_token(self) -> float:
        """Patches per token of this data; shown by check_page.html."""
        return sum(self.patches) / max(sum(self.tokens), 1)


def check_source(
    source: Source,
    path: str,
    encoder: ExampleEncoder,
    vision: PatchGeometry | None,
    *,
    decode: bool,
    resample: str = "bicubic",
    progress: Callable[[], None] = lambda: None,
) -> SourceFindings:
    """Reads and encodes every sample; with `decode` its pixels too, which finds files that are whole only in their
    header.
    """
    found = SourceFindings(source.name, path, len(source))
    seen_ids: dict[str, int] = {}
    seen_contents: dict[bytes, int] = {}
    spread = set(np.linspace(0, len(source) - 1, min(SHOWN, len(source))).astype(int).tolist())
    waiting = False
    for index in range(len(source)):
        progress()
        waiting = waiting or index in spread
        identifier = f"{source.name}:{index}"
        try:
            sample = source[index]
            identifier = sample.id
            example = encoder.encode(sample)
            if decode:
                example = example.with_pixels(vision, resample)
            digest = _content(sample)
        except SampleError as error:
            found.reasons[error.reason] += 1
            if len(found.skipped) < LISTED:
                found.skipped.append((error.sample_id or identifier, source.where(index), error.reason, str(error)))
            continue
        found.tokens.append(example.length)
        found.learned.append(int((example.loss_weights > 0).sum()))
        found.patches.append(example.patches)
        found.media.append(len(example.visuals))
        found.truncated += example.truncated > 0
        found.shrunk += example.shrunk > 0
        found.tasks[sample.task or ""] += 1
        if waiting:
            found.shown.append((sample, dataclasses.replace(example, pixels=None)))
            waiting = False
        repeated = None
        if digest in seen_contents:
            repeated = f"same turns and media as {source.where(seen_contents[digest])}"
        elif sample.id in seen_ids:
            repeated = f"same id as {source.where(seen_ids[sample.id])}"
        seen_contents.setdefault(digest, index)
        seen_ids.setdefault(sample.id, index)
        if repeated is not None:
            found.duplicate_count += 1
            if len(found.duplicates) < LISTED:
                found.duplicates.append((sample.id, source.where(index), repeated))
    return found


def _content(sample: Sample) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for message in sample.messages:
        digest.update(
            f"{message.role}\0{message.content}\0{message.weight}\0{message.reasoning}\0{message.calls}\0".encode()
        )
    digest.update(repr(sample.tools).encode())
    for media in (*sample.images, *sample.videos):
        digest.update(hashlib.blake2b(read_bytes(media), digest_size=16).digest())
    return digest.digest()


def advice(
    findings: Sequence[SourceFindings], max_tokens: int | None, weights: dict[str, float] | None = None
) -> list[str]:
    """Advice: what to set or fix. `weights` are those of the mixture; without them sources count by their samples."""
    kept = [found for found in findings if found.kept]
    if not kept:
        return ["No sample can be used. The reasons below say why; nothing will train on this data."]
    lines = []
    tokens = np.concatenate([np.array(found.tokens, np.int64) for found in kept])

    def share(found):
        return weights[found.name] / found.kept if weights else 1.0

    ratio = sum(share(found) * sum(found.patches) for found in kept) / sum(
        share(found) * sum(found.tokens) for found in kept
    )
    lines.append(
        f"A token position needs {ratio:.2f} patch positions in this {'mixture' if weights else 'data'}. With "
        "sequence_length T, patches_per_row near "
        f"{ratio * 1.03:.2f} T fills both budgets; for T = 8192 that is {int(8192 * ratio * 1.03) // 4 * 4}."
    )
    lines.append(
        f"Half of the samples have at most {int(np.median(tokens))} tokens, 99 of 100 at most "
        f"{int(np.percentile(tokens, 99))}, the longest {int(tokens.max())}."
    )
    for found in findings:
        skipped = sum(found.reasons.values())
        if skipped:
            worst, count = found.reasons.most_common(1)[0]
            lines.append(
                f"{found.name}: {skipped} of {found.records} samples ({skipped / found.records:.1%}) cannot "
                f"be used, most of them for {worst} ({count})."
            )
        if found.truncated:
            lines.append(f"{found.name}: {found.truncated} samples lose turns to the limit of {max_tokens} tokens.")
        if found.shrunk:
            lines.append(
                f"{found.name}: {found.shrunk} samples have images that a row is too small for, so they are "
                "shrunk below max_pixels; raise patches_per_row, or lower max_pixels."
            )
        if found.duplicate_count:
            lines.append(f"{found.name}: {found.duplicate_count} samples repeat others.")
    return lines
