"""Many runs from one study file: list algebra, a runner that survives being killed, search, launchers, results.

A study file defines `get_study() -> Study`; `ldm sweep experiments/NAME.py --workdir=DIR` runs it. Most of them
import nothing but `from ldm_jax.sweeps import Study, Plot, product, sweep, train_and_evaluate`.
"""

from ldm_jax.sweeps.algebra import chain, fixed, product, sweep, zipit
from ldm_jax.sweeps.study import Plot, Range, Search, Study, evaluate_only, train_and_evaluate

__all__ = [
    "Plot",
    "Range",
    "Search",
    "Study",
    "chain",
    "evaluate_only",
    "fixed",
    "product",
    "sweep",
    "train_and_evaluate",
    "zipit",
]
