"""Config files: how they are read, which keys they have, and how a block becomes a call. What the values mean is said by training/."""
