"""A published scheduler_config.json in terms of ldm_jax.diffusion.

schedule.py     load(config) -> Schedule; Schedule.at(steps) -> (times, the schedule of that run)
classes.py      CLASSES: the scheduler classes by name, one line each
respacing.py    the same file with another spacing of the steps
family.py       the types in which a class is described
options.py, spacing.py, processes.py, multistep.py    what several classes share
the others      one file a family: options with their defaults, facts, grid and update rule
"""

from ldm_jax.schedules.classes import CLASSES as CLASSES
from ldm_jax.schedules.respacing import respaced as respaced
from ldm_jax.schedules.schedule import Schedule as Schedule
from ldm_jax.schedules.schedule import load as load
