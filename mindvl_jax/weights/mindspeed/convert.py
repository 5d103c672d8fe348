"""Qwen2.5-VL between Hugging Face folders and MindSpeed-MM's, in every direction, one tensor in memory at a time.

`HuggingFace` and `Megatron` are sources: both give a published tensor by name. `write_huggingface` and `write_megatron`
take either. The layout of a MindSpeed-MM folder is found from its directories and keys; sizes that no file tells
(heads) come from the config.json of a Hugging Face folder of the same model. Optimizer states are bound to their layout
and are not converted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.outline import outline_of
from mindvl_jax.weights.folder import WeightsFolder
from mindvl_jax.weights.mapping import mapping_of, read_config, slots
from mindvl_jax.weights.mindspeed import torch_zip
from mindvl_jax.weights.mindspeed.layout import (
    VIT_HEADS,
    VIT_ROWS,
    Heads,
    Item,
    MegatronLayout,
    items,
    join,
    pack,
    split,
    split_shape,
    unpack,
)

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Source(Protocol):
    """Published tensors by name."""

    def dtype(self, name: str) -> np.dtype: ...
    def tensor(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model by config.json: published tensors and their shapes, depth of both stacks, heads."""

    shapes: dict[str, tuple[int, ...]]
    depth: dict[str, int]
    heads: Heads
    tied: bool

    def divisible(self) -> dict[str, int]:
        """Numbers that tensor ranks must divide."""
        shapes = self.shapes
        return {
            "the key/value heads": self.heads.key_value,
            "the heads of the vision tower": self.heads.vision,
            "the vocabulary": shapes["model.embed_tokens.weight"][0],
            "the language model's feed-forward width": shapes["model.layers.0.mlp.gate_proj.weight"][0],
            "the tower's feed-forward width": shapes["visual.blocks.0.mlp.gate_proj.weight"][0],
            "the projector's width": shapes["visual.merger.mlp.0.weight"][0],
        }


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every published tensor of a model, with its shape."""
    shapes = {path: like.shape for path, like in outline_of(config).shapes.items()}
    return {slot.name: slot.shape for slot in slots(config, shapes)}


def sizes_of(folder: Path) -> Sizes:
    """Read config.json.

    Raises:
      UserError: another family than Qwen2.5-VL.
    """
    config = read_config(folder)
    if config.family != "mindvl" or config.text.family != "qwen2":
        raise UserError(f"{folder}: MindSpeed-MM's layout is known for Qwen2.5-VL only")
    heads = Heads(config.text.num_heads, config.text.num_kv_heads, config.vision.num_heads)
    depth = {"vision": config.vision.depth, "text": config.text.num_layers}
    return Sizes(published_shapes(config), depth, heads, config.text.tie_word_embeddings)


class HuggingFace:
    """Tensors of a Hugging Face folder; use as a context manager."""

    def __init__(self, folder: Path):
        self._files = WeightsFolder(folder, mapping_of(read_config(folder)))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HuggingFace:
        self._reader = self._stack.enter_context(self._files.reader())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def check(self, sizes: Sizes) -> None:
        known = {name: entry.shape for name, entry in self._files.entries.items()}
        extra = set(known) - set(sizes.shapes) - ({"lm_head.weight"} if sizes.tied else set())
        problems = [f"missing    {name}" for name in sizes.shapes if name not in known] + [
            f"unexpected {name}" for name in sorted(extra)
        ]
        problems += [
            f"misshapen  {name}: {list(known[name])}, expected {list(shape)}"
            for name, shape in sizes.shapes.items()
            if known.get(name, shape) != shape
        ]
        refuse(f"{self._files.folder}: weights and config.json do not fit", problems)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(jnp.dtype(self._files.entries[name].dtype))

    def tensor(self, name: str) -> np.ndarray:
        return self._reader.rows(name, 0, self._files.entries[name].shape[0])


class Megatron:
    """Tensors of a MindSpeed-MM folder (`release` or `iter_*`), by published name, joined and unpacked when they are
    asked for.

    Raises:
      UserError: directories or keys that make no layout; missing, unexpected or misshapen tensors, all of them at once;
        replicated tensors that differ between tensor ranks; a canonical tower split over tensor ranks without
        `vit_qkv`.
    """

    def __init__(self, folder: Path, sizes: Sizes, *, iteration: int | None = None, vit_qkv: str | None = None):
        self.folder, self._sizes = iteration_folder(folder, iteration), sizes
        ranks = _rank_directories(self.folder)
        tp, pp = 1 + max(rank for rank, _ in ranks), 1 + max(stage for _, stage in ranks)
        refuse(
            f"{self.folder}: directories make no grid of {tp} tensor and {pp} pipeline ranks",
            [
                f"missing mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                for rank in range(tp)
                for stage in range(pp)
                if (rank, stage) not in ranks
            ],
        )
        # [chunk][tensor rank] -> tensors by name
        models = {key: _models(path / FILE) for key, path in ranks.items()}
        vpp = max(len(found) for found in models.values())
        refuse(
            f"{self.folder}: virtual stages",
            [
                f"{ranks[key].name} has {len(found)}, another has {vpp}"
                for key, found in models.items()
                if len(found) != vpp
            ],
        )
        self._chunks = [
            [models[rank, stage][virtual] for rank in range(tp)] for virtual in range(vpp) for stage in range(pp)
        ]

        def count(chunk, prefix):
            return 1 + max((int(_LAYER.search(name).group(1)) for name in chunk if name.startswith(prefix)), default=-1)

        def nest(prefix):
            return tuple(
                tuple(count(self._chunks[virtual * pp + stage][0], prefix) for stage in range(pp))
                for virtual in range(vpp)
            )

        canonical = any(".q_proj." in name for chunk in self._chunks for name in chunk[0])
        if canonical and tp > 1 and vit_qkv is None:
            raise UserError(
                f"{self.folder}: a canonical checkpoint over {tp} tensor ranks. Their converter cuts the "
                f"tower's [Q; K; V] into row blocks ({VIT_ROWS}), while a "
                f"rank that attends with its own heads holds rows of each ({VIT_HEADS}); the file does not "
                f"tell which. Say it: --vit-qkv {VIT_ROWS} or --vit-qkv {VIT_HEADS}"
            )
        self.layout = MegatronLayout(
            tp,
            nest("image_encoder.encoder.blocks.layers."),
            nest("text_decoder.decoder.layers."),
            canonical,
            vit_qkv or VIT_ROWS,
        )
        self.layout.check(sizes.depth, sizes.divisible(), sizes.heads)
        self._where: dict[str, tuple[Item, int, str, int]] = {}
        self._take()

    def _take(self) -> None:
        """Match every tensor of the files with one that the layout asks for."""
        layout, tied = self.layout, self._sizes.tied
        has_head = any("text_decoder.output_layer.weight" in chunk[0] for chunk in self._chunks)
        every = items(canonical=layout.canonical, tied=tied, pipeline=has_head)
        problems, tied_heads = [], []
        for number, chunk in enumerate(self._chunks):
            left = [set(rank) for rank in chunk]
            for item, layer, own in layout.chunk_items(number, every):
                name = item.name.format(layer=own)
                published = [each.format(layer=layer) for each in item.published]
                wanted = split_shape(
                    item, whole_shape(item, [self._sizes.shapes[each] for each in published]), layout.tp
                )
                for rank, tensors in enumerate(chunk):
                    left[rank].discard(name)
                    if name not in tensors:
                        problems.append(f"missing    {name} in chunk {number} of tensor rank {rank}")
                    elif tensors[name].shape != wanted:
                        problems.append(
                            f"misshapen  {name} in chunk {number} of tensor rank {rank}: "
                            f"{list(tensors[name].shape)}, expected {list(wanted)}"
                        )
                if tied and item.name == "text_decoder.output_layer.weight":
                    tied_heads.append((item, number))
                    continue
                self._where |= {each: (item, number, name, position) for position, each in enumerate(published)}
            problems += [
                f"unexpected {name} in chunk {number} of tensor rank {rank}"
                for rank, names in enumerate(left)
                for name in sorted(names)
            ]
        refuse(f"{self.folder}: does not hold the model of config.json", problems)
        self._check_copies(every)
        for item, number in tied_heads:
            head = join(item, [rank[item.name].array() for rank in self._chunks[number]])
            if not _same_bits(head, self.tensor("model.embed_tokens.weight")):
                raise UserError(
                    f"{self.folder}: config.json ties the head to the token table, but "
                    "text_decoder.output_layer.weight differs from it"
                )

    def _check_copies(self, every: list[Item]) -> None:
        problems = []
        for number, chunk in enumerate(self._chunks):
            for item, _, own in self.layout.chunk_items(number, every):
                name = item.name.format(layer=own)
                if item.split == "whole" and any(
                    not _same_bits(chunk[0][name].array(), rank[name].array()) for rank in chunk[1:]
                ):
                    problems.append(f"{name} in chunk {number} is not split, yet differs between tensor ranks")
        refuse(f"{self.folder}: copies that are not equal", problems)

    def dtype(self, name: str) -> np.dtype:
        _, chunk, theirs, _ = self._where[name]
        return np.dtype(self._chunks[chunk][0][theirs].dtype)

    def tensor(self, name: str) -> np.ndarray:
        item, chunk, theirs, position = self._where[name]
        parts = [rank[theirs].array() for rank in self._chunks[chunk]]
        return unpack(item, join(item, parts, self.layout.vit_qkv), self._sizes.heads)[position]


def whole_shape(item: Item, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the packed tensor that holds published tensors of these shapes."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return one.dtype == other.dtype and np.array_equal(
        np.ascontiguousarray(one).view(bits), np.ascontiguousarray(other).view(bits)
    )


def refuse(what: str, problems: list[str]) -> None:
    """Raise UserError with the problems, if there are any."""
    if problems:
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError(
            "\n".join(
                [
                    f"{what} ({len(problems)} problem{'s' if len(problems) > 1 else ''}):",
                    *(f"  {line}" for line in problems[:10]),
                    *more,
                ]
            )
        )


# --- finding files ---------------------------------------------------------------------------------------------------


def is_megatron(folder: Path) -> bool:
    """Whether a folder looks like one of MindSpeed-MM's."""
    return (
        (folder / TRACKER).is_file()
        or any(folder.glob("mp_rank_*"))
        or any(folder.glob("release/mp_rank_*"))
        or any(folder.glob("iter_*/mp_rank_*"))
    )


def iteration_folder(folder: Path, iteration: int | None = None) -> Path:
    """Folder of the rank directories: the given iteration, else the one that the tracker file names.

    Raises:
      UserError: there is none.
    """
    if any(folder.glob("mp_rank_*")):
        return folder
    if iteration is None and (folder / TRACKER).is_file():
        text = (folder / TRACKER).read_text().strip()
        if text != "release" and not text.isdigit():
            raise UserError(f"{folder / TRACKER} holds {text[:40]!r}; expected `release` or a number")
        name = text if text == "release" else f"iter_{int(text):07d}"
    elif iteration is not None:
        name = f"iter_{iteration:07d}"
    else:
        name = "release"
    if not any((folder / name).glob("mp_rank_*")):
        known = sorted({path.parent.name for path in folder.glob("*/mp_rank_*")})
        raise UserError(
            f"{folder}: no {name}/mp_rank_*; there "
            f"{'are ' + ', '.join(known) if known else 'is no checkpoint of MindSpeed-MM'}"
        )
    return folder / name


def _rank_directories(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?", path.name)
        if match is None or match.group(3):
            raise UserError(
                f"{path}: expected mp_rank_TT or mp_rank_TT_PPP (expert parallelism does not occur in Qwen2.5-VL)"
            )
        found[int(match.group(1)), int(match.group(2) or 0)] = path
    return found


def _models(path: Path) -> list[dict[str, torch_zip.LazyTensor]]:
    """Tensors by name of each virtual stage of one rank file."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    content = torch_zip.read(path)
    keys = (
        sorted(
            (key for key in content if isinstance(key, str) and re.fullmatch(r"model\d*", key)),
            key=lambda key: int(key[5:] or 0),
        )
        if isinstance(content, dict)
        else []
    )
    if not keys:
        raise UserError(f"{path}: no `model` in it; expected a rank file of MindSpeed-MM")
    for key in keys:
        lora = [name for name in content[key] if ".lora_" in name]
        if lora:
            raise UserError(f"{path}: holds adapters ({lora[0]}); convert the merged model")
    return [
        {
            name: value
            for name, value in content[key].items()
            if isinstance(value, torch_zip.LazyTensor) and not name.endswith("_extra_state")
        }
        for key in keys
    ]


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; nothing is overwritten, name another")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if out.exists():
        out.rmdir()
    partial.rename(out)


def write_megatron(
    out: Path, source: Source, sizes: Sizes, layout: MegatronLayout, say: Callable[[str], None] = lambda line: None
) -> None:
    """Write `release/mp_rank_*` of a layout.

    Raises:
      UserError: a layout that does not fit the model, or `out` is not empty.
    """
    layout.check(sizes.depth, sizes.divisible(), sizes.heads)
    every = items(canonical=layout.canonical, tied=sizes.tied, pipeline=layout.pp > 1)

    def written(item: Item, layer: int | None, rank: int) -> torch_zip.Written:
        names = [each.format(layer=layer) for each in item.published]

        def make():
            return np.ascontiguousarray(
                split(
                    item,
                    pack(item, [source.tensor(name) for name in names], sizes.heads),
                    rank,
                    layout.tp,
                    layout.vit_qkv,
                )
            )

        shape = split_shape(item, whole_shape(item, [sizes.shapes[name] for name in names]), layout.tp)
        return torch_zip.Written(shape, source.dtype(names[0]), make)

    with _whole_folder(out) as folder:
        for rank in range(layout.tp):
            for stage in range(layout.pp):
                place = folder / "release" / layout.directory(rank, stage)
                place.mkdir(parents=True)
                chunks = [layout.chunk_items(virtual * layout.pp + stage, every) for virtual in range(layout.vpp)]
                models = [
                    {item.name.format(layer=own): written(item, layer, rank) for item, layer, own in chunk}
                    for chunk in chunks
                ]
                keys = ["model"] if layout.vpp == 1 else [f"model{virtual}" for virtual in range(layout.vpp)]
                torch_zip.write(place / FILE, {**dict(zip(keys, models, strict=True)), "checkpoint_version": 3.0})
                say(f"{place.name}: {sum(map(len, models))} tensors")
        (folder / TRACKER).write_text("release")


def write_huggingface(
    out: Path,
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    like: Path,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a Hugging Face folder with the files, names, dtypes and companions of `like`, a folder of the same model.

    Where `like` has no weights the tensors go into files of 5 GB in published order.
    """
    plan = _files_like(like)
    if plan is None:
        plan = _files_anew(source, shapes)
    published_name = mapping_of(read_config(like)).canonical
    embedding = next(name for name in shapes if name.endswith(EMBEDDING))
    wanted = {published_name(name) for names, _ in plan.values() for name in names}
    refuse(
        f"{like}: its weight files do not hold this model",
        [f"unknown {name}" for name in sorted(wanted - set(shapes) - {HEAD})],
    )
    with _whole_folder(out) as folder:
        for path in sorted(like.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith((".bin", ".pt")):
                shutil.copyfile(path, folder / path.name)
        for file, (names, metadata) in plan.items():

            def value(name):
                # A tied head that `like` holds all the same.
                return np.ascontiguousarray(source.tensor(name if name in shapes else embedding))

            save_file({name: value(published_name(name)) for name in names}, folder / file, metadata=metadata)
            say(f"{file}: {len(names)} tensors")
        if len(plan) > 1 and not (folder / "model.safetensors.index.json").is_file():
            index = {"metadata": {}, "weight_map": {name: file for file, (names, _) in plan.items() for name in names}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _files_like(like: Path) -> dict[str, tuple[list[str], dict[str, str] | None]] | None:
    files = sorted(like.glob("*.safetensors"))
    plan = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            plan[path.name] = (list(file.keys()), dict(file.metadata()) if file.metadata() else None)
    return plan or None


def _files_anew(
    source: Source, shapes: Mapping[str, tuple[int, ...]], limit: int = 5 * 10**9
) -> dict[str, tuple[list[str], dict[str, str] | None]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * source.dtype(name).itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    return {name: (group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)}
