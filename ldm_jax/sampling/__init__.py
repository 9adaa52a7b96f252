"""Noise backwards, once for everybody: runs of `ldm train` and published pipelines draw through the same functions.

    item i -> normal(fold_in(fold_in(key(seed), i), 0)) -> guided denoiser -> one lax.scan over a grid -> space.decode -> space.show

model      Space: what is modelled, its shape of any rank. Network and Model: apply, process, prediction, space
settings   how to draw, by names: sampler, grid, guidance, its schedule and its threshold; the tables of these names and their checks
keys       the random keys of item i, which depend on the seed and i alone
backwards  the function that goes from the state at times[0] to the state at times[-1]; it is traced, and holds no loop of Python
draw       items in batches of one shape: padding, placement on devices, progress, and the store of compiled programs
"""
