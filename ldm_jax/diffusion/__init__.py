"""The mathematics of diffusion: processes, predictions, losses, guidance, grids and samplers. Imports jax alone."""
