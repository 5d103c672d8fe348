"""YAML texts read in bounded time and memory: aliases that multiply, nesting and numbers without end are refused by
their place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import decode_text

LARGEST_FILE = 8 << 20
LARGEST_TREE = 20_000
"""Nodes of a document, with what aliases stand for counted anew at each place: a configuration has hundreds."""


class YamlError(UserError):
    """A text that is no YAML, or not one that a configuration can be."""


class Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as every user expects (YAML 1.1 reads a string)."""


Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read(path: Path) -> str:
    """Read a file of YAML.

    Raises YamlError for one that cannot be read, is no regular file, is too large, or is no text.
    """
    try:
        if path.exists() and not path.is_file():
            raise YamlError(f"{path}: a {'folder' if path.is_dir() else 'device or pipe'}; expected a YAML file")
        if path.stat().st_size > LARGEST_FILE:
            raise YamlError(f"{path}: has {path.stat().st_size:,} bytes; a configuration has a few thousand")
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: not UTF-8 text (byte {error.start}); a configuration is a YAML file") from error


def parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """Return the tree of a text with its marks, and what it means.

    Args:
      where: what to call the text in messages.

    Raises:
      YamlError: no valid YAML, more than `LARGEST_TREE` nodes, an alias that holds itself, nesting or numbers beyond
        what Python reads.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _size(node, where, {}, set())
        if node is None:
            return None, None
        # From a second tree: merge keys (<<) are written into the tree from which values are made.
        return node, yaml.load(text, Loader=Loader)
    except YamlError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise YamlError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or str(error)[:200]}") from error
    except RecursionError:
        raise YamlError(f"{where}: nested too deeply for a configuration") from None
    except (
        ValueError,
        OverflowError,
        TypeError,
    ) as error:  # a whole number of thousands of digits, a date that is none
        raise YamlError(f"{where}: a value cannot be read: {str(error)[:200]}") from None


def _size(node: yaml.Node, where: str, known: dict[int, int], above: set[int]) -> int:
    """Nodes of the tree with every alias written out; computed once for each node, so the count itself cannot grow."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise YamlError(f"{where}:{node.start_mark.line + 1}: holds itself through an alias")
    above.add(id(node))
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    total = 1 + sum(_size(child, where, known, above) for child in children)
    above.discard(id(node))
    if total > LARGEST_TREE:
        raise YamlError(
            f"{where}:{node.start_mark.line + 1}: {total:,} values with its aliases written out; a "
            "configuration has hundreds"
        )
    known[id(node)] = total
    return total
