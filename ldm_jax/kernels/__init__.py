"""How one operation is computed well on this backend, and nothing about networks; imports jax alone.

attention, convolution, dots of low precision, group normalization; which precision is fast here, freed memory, the device mesh.
"""
