"""Single operations, computed well on the backend at hand. Nothing here knows about networks; jax is the only library imported.

attention, conv (convolution), dense (matrix products in low precision), norm (group normalization), precision (which dtype is fast on
this machine), heap (memory that XLA frees on a CPU), mesh (the mesh of devices).
"""
