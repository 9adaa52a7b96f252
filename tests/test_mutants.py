"""The table of deliberate errors applies to the code as it is, and a run says what became of each."""

import pytest

from tests import mutants
from tests.mutant_table import ROWS, Row


def test_every_row_applies():
    assert mutants.wrong() == []
    assert len(ROWS) >= 60


def test_a_row_that_does_not_apply_is_named(tmp_path):
    for name, text in (("ldm_jax/a.py", "x = 1\ny = 1\n"), ("tests/test_a.py", "def test_x():\n    pass\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    test = "tests/test_a.py::test_x -k 'one or two'"
    rows = [
        Row("right", "a.py", "x = 1", "x = 2", test),
        Row("twice there", "a.py", "= 1", "= 2", test),
        Row("not there", "a.py", "x = 3", "x = 2", test),
        Row("no error", "a.py", "x = 1", "x = 1", test),
        Row("no file", "b.py", "x = 1", "x = 2", test),
        Row("no test", "a.py", "x = 1", "x = 2", "tests/test_a.py::test_y"),
        Row("no tests", "a.py", "x = 1", "x = 2", "tests/test_b.py"),
    ]
    lines = mutants.wrong(rows, tmp_path)
    assert [line.partition(":")[0] for line in lines] == [row.name for row in rows[1:]]
    assert len(mutants.wrong([rows[0], rows[0]], tmp_path)) == 2


@pytest.mark.parametrize(
    "code, output, expected",
    [
        (0, "3 passed", ("survived", "")),
        (1, "FAILED tests/test_a.py::test_x - assert 1 == 2\n1 failed", ("killed", "tests/test_a.py::test_x")),
        (1, "ERROR tests/test_a.py::test_x - ValueError\n1 error", ("killed", "tests/test_a.py::test_x")),
        (124, "no end after 900 s", ("killed", "no end after 900 s")),
        (2, "ERROR tests/test_a.py - SyntaxError\n1 error", ("broken", "1 error")),
        (5, "no tests ran", ("broken", "no tests ran")),
    ],
)
def test_outcomes(code, output, expected):
    assert mutants.outcome(code, output) == expected
