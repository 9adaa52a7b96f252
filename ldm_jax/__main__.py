from ldm_jax.cli import console

console()
