"""Moved to `mindvl_jax.core.params` and `mindvl_jax.models.outline`; these names stay until nobody imports them from here."""

from mindvl_jax.core.params import Outline as ModelOutline
from mindvl_jax.core.params import Params, flatten, matches, matches_any, require_matches
from mindvl_jax.models.outline import outline_of

__all__ = ["ModelOutline", "Params", "flatten", "matches", "matches_any", "outline_of", "require_matches"]
