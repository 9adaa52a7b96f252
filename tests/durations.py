"""How long each file of tests takes, so that the longest begin first and no worker is left with a long one at the end.

`make test ARGS=--record-durations` measures them anew, into durations.json. The order is all that they change.
"""

import collections
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).with_name("durations.json")
UNMEASURED = 20.0  # seconds, for a file that is not listed yet

_seconds: dict[str, float] = collections.defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each file to durations.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest file first; the tests of a file keep their order."""
    seconds = json.loads(FILE.read_text())
    items.sort(key=lambda item: (-seconds.get(file := item.nodeid.split("::")[0], UNMEASURED), file))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A worker of pytest-xdist has `workerinput`; the reports of all of them come to the one process without.
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        rows = sorted(_seconds.items(), key=lambda row: -row[1])
        FILE.write_text(json.dumps({file: round(seconds, 1) for file, seconds in rows}, indent=1) + "\n")
