"""The `adapters` section of a configuration, resolved against a model: which linear layers, at which rank and alpha.

Targets are PEFT's names (`q_proj`, `self_attn.q_proj`, `qkv`, `all-linear`) or globs over our module paths
(`language/layers/attention/*`). Every target and every key of `ranks` and `alphas` must select something: a typo there
would otherwise train less than the user believes, or, with no target left, everything.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import matches
from mindvl_jax.models.adapters import Adapter, Layout, kernel_path, of_experts
from mindvl_jax.models.hf import TRANSPOSE, Rule
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.registry import SPECS, spec_of
from mindvl_jax.weights.mapping import mapping_of


def require_checked_family(config: Any) -> None:
    """Refuse adapters on a model whose layers were not checked with them."""
    if not spec_of(config).adapters:
        checked = [name for name, spec in SPECS.items() if spec.adapters]
        raise UserError(
            f"adapters: not built for model.family {config.family}; they work on "
            f"{', '.join(checked[:-1])} and {checked[-1]}"
        )


class LinearShapes(NamedTuple):
    """lead: sizes of the stacks (layers, experts). inputs: width. outputs: rows of the published matrix in each of our
    modules.
    """

    lead: tuple[int, ...]
    inputs: int
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PublishedLinear:
    """A published linear layer that can take an adapter.

    Attributes:
      rule: of its weight. modules: our module paths, in the order of its rows.
    """

    rule: Rule
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """Published module name, with `{layer}` and `{expert}` where they are numbered."""
        return self.rule.published.removesuffix(".weight")

    def cells(self, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(published name, index into our stacks) of each layer and expert."""
        for index in itertools.product(*map(range, self.shapes(config).lead)):
            yield self.rule.name(index).removesuffix(".weight"), index

    def shares(self, path: str) -> str | None:
        """Module whose A `path` uses when all are adapted as one layer. nnx keeps a shared variable under the first
        path in sorted order.
        """
        owner = min(self.modules)
        return None if path == owner else owner

    def shapes(self, config: Any) -> LinearShapes:
        kernels = [_kernel_shapes(config)[kernel_path(path)] for path in self.modules]
        return LinearShapes(kernels[0][: self.rule.stack_axes], kernels[0][-2], tuple(shape[-1] for shape in kernels))


@functools.lru_cache(maxsize=16)
def _tables(config: Any) -> tuple[tuple[PublishedLinear, ...], tuple[str, ...]]:
    linears, others = [], []
    for rule in mapping_of(config).rules(config):
        name, _, leaf = rule.published.rpartition(".")
        if leaf != "weight":
            continue
        # The loss reads the output matrix by itself, and a router is no linear layer in transformers either.
        apart = rule.ours[0] == "language/head/kernel" or rule.ours[0].endswith("/router/kernel")
        if rule.form == TRANSPOSE and not apart:
            linears.append(PublishedLinear(rule, tuple(path.removesuffix("/kernel") for path in rule.ours)))
        else:
            others.append(name)
    return tuple(linears), tuple(others)


def published_linears(config: Any) -> tuple[PublishedLinear, ...]:
    """Linear layers and matrices of experts that can take an adapter: all but the output matrix and routers."""
    return _tables(config)[0]


def linear_modules(config: Any) -> tuple[str, ...]:
    """Module paths of the linear layers that can take an adapter."""
    return tuple(path for linear in published_linears(config) for path in linear.modules)


def names_that_cannot_adapt(config: Any) -> tuple[str, ...]:
    """Published modules with a weight that take no adapter here: embeddings, norms, the patch convolution, the output
    matrix.
    """
    return _tables(config)[1]


@functools.lru_cache(maxsize=16)
def _kernel_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {path: like.shape for path, like in outline_of(config).shapes.items()}


def _ends_with(name: str, target: str) -> bool:
    """PEFT's rule for `target_modules`: the whole name, or its end after a dot."""
    return name == target or name.endswith("." + target)


def _select(target: str, config: Any) -> dict[str, str | None]:
    """Module paths that one target selects, each with the path whose A it shares. {} when there is none.

    Raises:
      UserError: a PEFT name that also selects modules which cannot take an adapter.
    """
    linears, others = _tables(config)
    if target == "all-linear":  # as PEFT selects: experts are no linear layers there
        plain = [linear for linear in linears if not of_experts(linear.modules[0])]
        return {path: linear.shares(path) for linear in plain for path in linear.modules}
    if "/" in target or "*" in target:
        return {path: None for linear in linears for path in linear.modules if matches(path, target)}
    refused = [name for name in others if _ends_with(name, target)]
    if refused:
        why = (
            "PEFT would adapt it too, we cannot: it is an embedding, a norm, a convolution, a router or the output "
            "matrix"
        )
        longer = [linear.name.split("{layer}.")[-1] for linear in linears if _ends_with(linear.name, target)]
        raise UserError(
            f"adapters.targets: {target!r} selects {refused[0]} ({why})"
            + (f"; name {longer[0]!r} instead" if longer else "")
        )
    found = [linear for linear in linears if _ends_with(linear.name, target)]
    return {path: linear.shares(path) for linear in found for path in linear.modules}


def layout_of(settings: AdaptersConfig, config: Any) -> Layout:
    """Resolve the `adapters` section against a model.

    Raises:
      UserError: targets or keys of `ranks` and `alphas` that select nothing; two targets that disagree on sharing A.
    """
    require_checked_family(config)
    problems: list[str] = []
    chosen: dict[str, str | None] = {}
    for target in settings.targets:
        selected = _select(target, config)
        if not selected:
            problems.append(f"adapters.targets: {target!r} selects no linear layer{_near(target, config)}")
        for path, shares in selected.items():
            if path in chosen and chosen[path] != shares:
                problems.append(
                    f"adapters.targets: {target!r} and an earlier target both select {path}, once with an A "
                    "of its own and once with a shared one"
                )
            chosen.setdefault(path, shares)
    ranks = _by_module(settings.ranks, "ranks", chosen, config, problems)
    alphas = _by_module(settings.alphas, "alphas", chosen, config, problems)
    layout = {}
    for path, shares in sorted(chosen.items()):
        layout[path] = Adapter(
            ranks.get(path, settings.rank),
            float(alphas.get(path, settings.alpha)),
            settings.rslora,
            settings.dora,
            shares,
        )
    for path, adapter in layout.items():
        if (
            adapter.shares is not None
            and (other := layout.get(adapter.shares))
            and (other.rank, other.alpha) != (adapter.rank, adapter.alpha)
        ):
            problems.append(
                f"adapters.ranks or adapters.alphas: {path} and {adapter.shares} share one A, so their rank "
                "and alpha must be equal"
            )
    experts = [path for path in layout if of_experts(path)]
    if experts and settings.dora:
        problems.append(f"adapters.dora: not built for experts ({experts[0]}); use lora or rslora there")
    if settings.base == "nf4" and any(of_experts(path) for path in linear_modules(config)):
        problems.append("adapters.base: nf4 does not hold experts, most of this model; leave it out")
    if problems:
        raise UserError("\n".join(problems))
    return layout


def _by_module(
    values: Mapping[str, Any], key: str, chosen: Mapping[str, Any], config, problems: list[str]
) -> dict[str, Any]:
    """Value of each chosen module; the first key that selects it wins."""
    found: dict[str, Any] = {}
    for target, value in values.items():
        selected = [path for path in _select(target, config) if path in chosen]
        if not selected:
            problems.append(f"adapters.{key}: {target!r} selects none of the targeted layers{_near(target, config)}")
        for path in selected:
            found.setdefault(path, value)
    return found


def _near(target: str, config) -> str:
    linears = published_linears(config)
    names = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
    pool = sorted({path for linear in linears for path in linear.modules}) if "/" in target or "*" in target else names
    close = difflib.get_close_matches(target, pool, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else ""
    ) + f" Published names are {', '.join(names)}; paths look like {linears[0].modules[0]}"
