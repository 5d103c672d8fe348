"""MindSpeed-MM's layout of Qwen2.5-VL: names, packing, tensor-parallel splits and pipeline chunks.

Facts: its `checkpoint/vlm_model` (converters/qwen2_5vl.py, operator.py, hf_to_mm.py). A model is cut into vpp * pp
chunks; chunk c of the list lies in virtual stage c // pp of pipeline rank c % pp, and numbers its layers from 0. Two
forms exist: fused (`linear_qkv`, `linear_fc1`) and canonical, where query, key, value, gate and up stay apart in the
language model and gate and up in the tower.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from mindvl_jax.core.errors import UserError

Split = Literal["whole", "rows", "columns", "gated"]
Place = Literal["first", "last", "layer"]
VIT_ROWS, VIT_HEADS = "rows", "heads"
"""Split of the tower's qkv in a canonical file with tensor parallelism: row blocks of [Q; K; V], or whole heads."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes that packing needs and no file tells. query, key_value: heads of the language model; vision: heads of the
    tower.
    """

    query: int
    key_value: int
    vision: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One MindSpeed-MM tensor.

    Attributes:
      name: theirs, with `{layer}` inside a stack. published: the tensors that it holds, with `{layer}`.
      part: tower or language model. place: chunk of the part that it belongs to.
      pack: same; rows (one after another); groups (by key/value head: its queries, key, value); heads ([Q; K; V] to
        head by head).
      split: over tensor ranks.
    """

    name: str
    published: tuple[str, ...]
    part: Literal["vision", "text"]
    place: Place
    pack: Literal["same", "rows", "groups", "heads"] = "same"
    split: Split = "whole"


_TEXT, _TEXT_HF = "text_decoder.decoder.layers.{layer}", "model.layers.{layer}"
_TOWER, _TOWER_HF = "image_encoder.encoder.blocks.layers.{layer}", "visual.blocks.{layer}"


def items(*, canonical: bool, tied: bool, pipeline: bool) -> list[Item]:
    """Every tensor of the model.

    Args:
      tied: the head is the token table; it is written a second time where the last stage is not the first (`pipeline`).
    """
    found = [
        Item("image_encoder.encoder.patch_embed.proj.weight", ("visual.patch_embed.proj.weight",), "vision", "first"),
        Item("image_encoder.projector.layernorm.weight", ("visual.merger.ln_q.weight",), "vision", "last"),
        Item(
            "image_encoder.projector.encoder.linear_fc1.weight",
            ("visual.merger.mlp.0.weight",),
            "vision",
            "last",
            split="rows",
        ),
        Item(
            "image_encoder.projector.encoder.linear_fc1.bias",
            ("visual.merger.mlp.0.bias",),
            "vision",
            "last",
            split="rows",
        ),
        Item(
            "image_encoder.projector.encoder.linear_fc2.weight",
            ("visual.merger.mlp.2.weight",),
            "vision",
            "last",
            split="columns",
        ),
        Item("image_encoder.projector.encoder.linear_fc2.bias", ("visual.merger.mlp.2.bias",), "vision", "last"),
        Item(
            "text_decoder.embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            "text",
            "first",
            split="rows",
        ),
        Item("text_decoder.decoder.final_layernorm.weight", ("model.norm.weight",), "text", "last"),
    ]
    if not tied or pipeline:
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        found.append(Item("text_decoder.output_layer.weight", (head,), "text", "last", split="rows"))

    def layer(part, theirs, published, **options):
        ours = (_TOWER, _TOWER_HF) if part == "vision" else (_TEXT, _TEXT_HF)
        found.append(
            Item(f"{ours[0]}.{theirs}", tuple(f"{ours[1]}.{name}" for name in published), part, "layer", **options)
        )

    for kind in ("weight", "bias"):
        layer(
            "vision",
            f"self_attention.linear_qkv.{kind}",
            [f"attn.qkv.{kind}"],
            pack="same" if canonical else "heads",
            split="rows",
        )
        layer(
            "vision",
            f"self_attention.linear_proj.{kind}",
            [f"attn.proj.{kind}"],
            split="columns" if kind == "weight" else "whole",
        )
        if canonical:
            layer("vision", f"mlp.gate_proj.{kind}", [f"mlp.gate_proj.{kind}"], split="rows")
            layer("vision", f"mlp.up_proj.{kind}", [f"mlp.up_proj.{kind}"], split="rows")
        else:
            layer(
                "vision",
                f"mlp.linear_fc1.{kind}",
                [f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"],
                pack="rows",
                split="gated",
            )
        layer(
            "vision",
            f"mlp.linear_fc2.{kind}",
            [f"mlp.down_proj.{kind}"],
            split="columns" if kind == "weight" else "whole",
        )
        if canonical:
            for short in "qkv":
                layer("text", f"self_attention.{short}_proj.{kind}", [f"self_attn.{short}_proj.{kind}"], split="rows")
        else:
            layer(
                "text",
                f"self_attention.linear_qkv.{kind}",
                [f"self_attn.{short}_proj.{kind}" for short in "qkv"],
                pack="groups",
                split="rows",
            )
    for norm, published in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2")):
        layer("vision", f"{norm}.weight", [f"{published}.weight"])
    layer("text", "input_layernorm.weight", ["input_layernorm.weight"])
    layer("text", "pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"])
    layer("text", "self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], split="columns")
    if canonical:
        layer("text", "mlp.gate_proj.weight", ["mlp.gate_proj.weight"], split="rows")
        layer("text", "mlp.up_proj.weight", ["mlp.up_proj.weight"], split="rows")
    else:
        layer(
            "text", "mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], pack="rows", split="gated"
        )
    layer("text", "mlp.linear_fc2.weight", ["mlp.down_proj.weight"], split="columns")
    return found


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(item: Item, arrays: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
    """Published tensors to the whole (not split) tensor of theirs."""
    if item.pack == "same":
        return arrays[0]
    if item.pack == "rows":
        return np.concatenate(arrays)
    count = heads.key_value if item.pack == "groups" else heads.vision
    parts = arrays if item.pack == "groups" else np.split(arrays[0], 3)
    blocks = [part.reshape(count, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(blocks, axis=1).reshape(-1, *arrays[0].shape[1:])


def unpack(item: Item, whole: np.ndarray, heads: Heads) -> list[np.ndarray]:
    """The inverse of `pack`."""
    if item.pack == "same":
        return [whole]
    if item.pack == "rows":
        return np.split(whole, len(item.published))
    if item.pack == "heads":
        blocks = whole.reshape(heads.vision, 3, -1, *whole.shape[1:])
        return [np.concatenate([blocks[:, part].reshape(-1, *whole.shape[1:]) for part in range(3)])]
    ratio = heads.query // heads.key_value
    head_dim = whole.shape[0] // (heads.key_value * (ratio + 2))
    blocks = whole.reshape(heads.key_value, (ratio + 2) * head_dim, *whole.shape[1:])
    return [
        blocks[:, start:stop].reshape(-1, *whole.shape[1:])
        for start, stop in (
            (0, ratio * head_dim),
            (ratio * head_dim, (ratio + 1) * head_dim),
            ((ratio + 1) * head_dim, None),
        )
    ]


def split(item: Item, whole: np.ndarray, rank: int, tp: int, vit_qkv: str = VIT_ROWS) -> np.ndarray:
    """Part of one tensor rank."""
    if tp == 1 or item.split == "whole":
        return whole
    if item.split == "columns":
        return np.split(whole, tp, axis=1)[rank]
    thirds = 3 if _head_rows(item, vit_qkv) else 2 if item.split == "gated" else 1
    return np.concatenate([np.split(part, tp)[rank] for part in np.split(whole, thirds)])


def join(item: Item, parts: Sequence[np.ndarray], vit_qkv: str = VIT_ROWS) -> np.ndarray:
    """The inverse of `split`: parts of all tensor ranks to the whole tensor."""
    if len(parts) == 1 or item.split == "whole":
        return np.asarray(parts[0])
    if item.split == "columns":
        return np.concatenate(parts, axis=1)
    thirds = 3 if _head_rows(item, vit_qkv) else 2 if item.split == "gated" else 1
    pieces = [np.split(part, thirds) for part in parts]
    return np.concatenate([rank[number] for number in range(thirds) for rank in pieces])


def _head_rows(item: Item, vit_qkv: str) -> bool:
    return vit_qkv == VIT_HEADS and item.pack == "same" and ".linear_qkv." in item.name


def split_shape(item: Item, shape: Sequence[int], tp: int) -> tuple[int, ...]:
    """Shape of one tensor rank's part of a whole tensor."""
    if tp == 1 or item.split == "whole":
        return tuple(shape)
    axis = 1 if item.split == "columns" else 0
    return tuple(size // tp if number == axis else size for number, size in enumerate(shape))


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MegatronLayout:
    """Tensor ranks and the layers of each chunk.

    Attributes:
      vision_layers, text_layers: [virtual stage][pipeline rank], as their `vit_pp_layers` and `llm_pp_layers`.
    """

    tp: int
    vision_layers: tuple[tuple[int, ...], ...]
    text_layers: tuple[tuple[int, ...], ...]
    canonical: bool = False
    vit_qkv: str = VIT_ROWS

    @property
    def vpp(self) -> int:
        return len(self.text_layers)

    @property
    def pp(self) -> int:
        return len(self.text_layers[0])

    def layers(self, part: str) -> tuple[int, ...]:
        """Layers of each chunk, in the order of chunks."""
        return tuple(itertools.chain(*(self.vision_layers if part == "vision" else self.text_layers)))

    def check(self, depth: dict[str, int], sizes: dict[str, int], heads: Heads) -> None:
        """Refuse a layout that does not fit the model.

        Args:
          depth: layers of `vision` and `text`. sizes: name -> number that the tensor ranks must divide.
        """
        problems = []
        for part, name in (("vision", "vit_pp_layers"), ("text", "llm_pp_layers")):
            nested = self.vision_layers if part == "vision" else self.text_layers
            if len({len(stage) for stage in nested}) != 1 or len(nested) != self.vpp or len(nested[0]) != self.pp:
                problems.append(
                    f"{name} {[list(stage) for stage in nested]}: expected {self.vpp} lists of {self.pp} "
                    "numbers, as the other list has"
                )
            elif sum(self.layers(part)) != depth[part]:
                problems.append(
                    f"{name} {[list(stage) for stage in nested]} holds {sum(self.layers(part))} layers, the "
                    f"model has {depth[part]}"
                )
        vision, text = (np.flatnonzero(self.layers(part)) for part in ("vision", "text"))
        if not problems and len(vision) and len(text) and vision[-1] > text[0]:
            problems.append(
                "a chunk with layers of the language model comes before the last one with layers of the vision tower"
            )
        problems += [
            f"tensor parallelism {self.tp} does not divide {name} ({size})"
            for name, size in sizes.items()
            if size % self.tp
        ]
        if heads.query % heads.key_value:
            problems.append(f"{heads.query} heads are no multiple of {heads.key_value} key/value heads")
        if problems:
            raise UserError("\n".join(problems))

    def directory(self, tensor_rank: int, pipeline_rank: int) -> str:
        return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if self.pp > 1 else "")

    def chunk_items(self, chunk: int, every: Sequence[Item]) -> Iterator[tuple[Item, int | None, int | None]]:
        """(item, layer of the model, layer of the chunk) of everything that lies in a chunk."""
        for item in every:
            counts = self.layers(item.part)
            filled = [number for number, count in enumerate(counts) if count]
            if item.place == "layer":
                start = sum(counts[:chunk])
                yield from ((item, start + number, number) for number in range(counts[chunk]))
            elif chunk == (filled[0] if item.place == "first" else filled[-1]):
                yield item, None, None


def even_layout(tp: int, pp: int, vpp: int, depth: dict[str, int], **options) -> MegatronLayout:
    """All of the tower in the first chunk, the language model's layers spread evenly over the chunks, the remainder
    over the last ones.
    """
    chunks = pp * vpp
    counts = [depth["text"] // chunks + (number >= chunks - depth["text"] % chunks) for number in range(chunks)]

    def nest(flat):
        return tuple(tuple(int(count) for count in flat[stage * pp : (stage + 1) * pp]) for stage in range(vpp))

    return MegatronLayout(tp, nest([depth["vision"]] + [0] * (chunks - 1)), nest(counts), **options)
