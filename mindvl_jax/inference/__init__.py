"""Text out: requests in, answers out.

`Generator` is the door; `Request`, `Sampling` and `Answer` are what goes through it.
"""

from mindvl_jax.inference.generator import Generator, Piece
from mindvl_jax.inference.request import Answer, Request, Sampling

__all__ = ["Answer", "Generator", "Piece", "Request", "Sampling"]
