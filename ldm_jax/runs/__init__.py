"""A run on disk: its folder, its config, its checkpoints, its log and its lock."""

from ldm_jax.runs.run import Run, read

__all__ = ["Run", "read"]
