"""Terms of an autoencoder's loss, one file a term: make(context, **block) -> Term, or None where nothing is read.

TERMS lists those that have a block of config.task, by the name of the block. A new term is a file and a line here.
"""

from collections.abc import Callable

from ldm_jax.training.terms import adversarial, alignment, perceptual
from ldm_jax.training.terms.term import Term

TERMS: dict[str, Callable[..., Term | None]] = {
    "perceptual": perceptual.make,
    "align": alignment.make,
    "adversarial": adversarial.make,
}
