"""One process agrees with itself; two real ones do so in tests/training/run_process.py."""

import numpy as np

from ldm_jax.kernels import processes


def test_one_process_agrees_with_itself():
    assert processes.is_first()
    for value in (True, False, 3):
        assert processes.from_first(value) is value
    array = np.array([True, False])
    assert processes.from_first(array) is array
    assert processes.any_process(True) is True and processes.any_process(False) is False
    processes.wait("nothing")
