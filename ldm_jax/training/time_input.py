"""That the number which a process feeds is the one that the network takes.

embedding of the network      takes                              processes
positional (DiT, U-Net)       any number, best in 0..999         all
fourier (U-Net)               a number of order 1                ve (log sigma), edm (log(sigma) / 4), trig (an angle)
fourier_log (NCSN++)          sigma, whose log it takes itself   ve, edm: they are made to feed sigma
"""

from typing import Any

import jax.numpy as jnp

from ldm_jax.diffusion.process import Process, with_sigma_input

# More turns of a feature than this between the ends of time tell neighbouring times apart no more.
WIDEST = 50


def suited(process: Process, network: Any) -> Process:
    """The process as it feeds this network. Raises ValueError if the process has no number that this network can be fed."""
    embedding = getattr(network, "time_embedding_type", "positional")
    if embedding == "fourier_log":
        try:
            return with_sigma_input(process)
        except ValueError as error:
            raise ValueError(
                f"config.process does not fit config.model.time_embedding_type='fourier_log': {error}"
            ) from error
    if embedding == "fourier":
        first, last = map(float, process.time_input(jnp.asarray([max(process.t_min, 1e-3), process.t_max])))
        if not abs(last - first) <= WIDEST:
            raise ValueError(
                f"config.process feeds the network numbers from {first:g} to {last:g}, too far apart for "
                "config.model.time_embedding_type='fourier'; expected 'positional', or a process ve, edm or trig"
            )
    return process
