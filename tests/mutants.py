"""Measures the power of the test suite: small deliberate errors (mutants), one at a time, and whether a test sees each.

    python -m tests.mutants list [WORD ...]                  the rows, by name
    python -m tests.mutants check                            that each row still applies: its text stands once in its file
    python -m tests.mutants run [WORD ...] [--jobs=N]        apply, test, report; exit code 1 unless every mutant is killed

A WORD picks the rows that contain it in their name, file or tests. The rows are in tests/mutant_table.py. Everything happens in a
temporary copy of the working tree. The tests of a row are run there once without the error, so that a failure with it is the error's
doing. The outcome of each row is kept in build/mutants.json:

    killed      a test failed, or did not end within the time
    survived    all tests passed: a test is missing
    broken      the tests fail without the error too, none of them ran, or the module cannot be imported with it: mend the row
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.mutant_table import ROWS, Row

ROOT = pathlib.Path(__file__).parents[1]
REPORT = ROOT / "build" / "mutants.json"
LIMIT = 900  # seconds of one run of tests
PYTEST = ("-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider")  # pyproject.toml has -q


def wrong(rows: Sequence[Row] = ROWS, root: pathlib.Path = ROOT) -> list[str]:
    """A line for each row that does not apply to the tree at `root`: a name or a file that is wrong, a text that is not there once."""
    lines, texts = [], {}
    for row in rows:
        path = root / "ldm_jax" / row.file
        if sum(other.name == row.name for other in rows) > 1:
            lines.append(f"{row.name}: two rows have this name")
        if not path.is_file():
            lines.append(f"{row.name}: there is no file ldm_jax/{row.file}")
            continue
        text = texts.setdefault(path, path.read_text())
        if (count := text.count(row.old)) != 1:
            lines.append(f"{row.name}: ldm_jax/{row.file} holds {row.old!r} {count} times, expected once")
        elif row.new == row.old:
            lines.append(f"{row.name}: old and new are the same text")
        for test in tests(row):
            file, *names = test.split("::")
            path = root / file
            text = texts.setdefault(path, path.read_text() if path.is_file() else "")
            if not text or any(f"def {name.partition('[')[0]}(" not in text for name in names):
                lines.append(f"{row.name}: there is no test {test}")
    return lines


def tests(row: Row) -> list[str]:
    """The files and tests of a row, without the options of pytest between them."""
    return [word for word in shlex.split(row.tests) if word.startswith("tests/")]


def picked(words: Sequence[str]) -> list[Row]:
    """The rows that contain one of the words, or all. ValueError where there is none."""
    rows = [row for row in ROWS if not words or any(word in f"{row.name} {row.file} {row.tests}" for word in words)]
    if not rows:
        raise ValueError(f"no row contains {' or '.join(words)}; see `python -m tests.mutants list`")
    return rows


def copy(folder: pathlib.Path) -> None:
    """The working tree as it is now, tracked files and new ones that git does not ignore, in `folder`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not one that was deleted and is not committed yet
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # Some tests look for the working tree's environment beside the package.
    for name in (".venv", "build"):
        if (ROOT / name).exists():
            (folder / name).symlink_to((ROOT / name).resolve())


def run_tests(tree: pathlib.Path, words: str) -> tuple[int, str]:
    """pytest's exit code (124: out of time) and output in a copy of the tree."""
    # Without files of byte code: one that is as old and as long as the changed source would be taken for it.
    environment = os.environ | {"PYTHONPATH": str(tree), "LDM_REPO": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *PYTEST, *shlex.split(words)]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {LIMIT} s"
    return done.returncode, done.stdout + done.stderr


def mutated(tree: pathlib.Path, row: Row) -> tuple[int, str]:
    """run_tests with the error of a row, which is taken out again."""
    path = tree / "ldm_jax" / row.file
    text = path.read_text()
    path.write_text(text.replace(row.old, row.new))
    try:
        return run_tests(tree, row.tests)
    finally:
        path.write_text(text)


def outcome(code: int, output: str) -> tuple[str, str]:
    """('killed', the test that failed), ('survived', '') or ('broken', why)."""
    if code == 0:
        return "survived", ""
    if code == 124:
        return "killed", output
    failed = re.search(r"^FAILED (\S+)|^ERROR (\S+::\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return "killed", failed[1] or failed[2]
    return "broken", (output.strip().splitlines() or ["no output"])[-1]


def run(words: Sequence[str], jobs: int) -> int:
    """Run the rows that contain one of the words, `jobs` at a time; print and keep the outcomes. 1 unless all are killed."""
    rows = picked(words)
    if lines := wrong(rows):
        print("\n".join(lines))
        return 1
    kept = json.loads(REPORT.read_text()) if REPORT.is_file() else {}
    outcomes = {name: kept[name] for name in (row.name for row in ROWS) if name in kept}
    with tempfile.TemporaryDirectory(prefix="mutants") as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        trees: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(jobs):
            tree = pathlib.Path(folder) / str(i)
            tree.mkdir()
            copy(tree)
            trees.put(tree)

        def unchanged(words: str) -> str:
            """Why the tests of a row say nothing; '' where they pass without an error."""
            tree = trees.get()
            try:
                code, output = run_tests(tree, words)
            finally:
                trees.put(tree)
            if code or not re.search(r"\d+ passed", output):
                return f"without the error: exit code {code}, {(output.strip().splitlines() or ['no output'])[-1]}"
            return ""

        def one(row: Row, before: concurrent.futures.Future) -> dict:
            if why := before.result():
                return {"outcome": "broken", "why": why, "seconds": 0.0}
            tree, since = trees.get(), time.perf_counter()
            try:
                what, why = outcome(*mutated(tree, row))
            finally:
                trees.put(tree)
            return {"outcome": what, "why": why, "seconds": round(time.perf_counter() - since, 1)}

        # The run without an error comes before those that wait for it, so that no thread waits for one that has not begun.
        before, running = {}, {}
        for row in sorted(rows, key=lambda row: row.tests):
            if row.tests not in before:
                before[row.tests] = pool.submit(unchanged, row.tests)
            running[pool.submit(one, row, before[row.tests])] = row
        try:
            for future in concurrent.futures.as_completed(running):
                row, result = running[future], future.result()
                print(f"{result['outcome']:9}{result['seconds']:7.1f} s  {row.name}  {result['why']}", flush=True)
                outcomes[row.name] = {"file": row.file, "tests": row.tests, **result}
                REPORT.parent.mkdir(exist_ok=True)
                REPORT.write_text(json.dumps(outcomes, indent=1) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C: what waits is not begun
            raise
    count = {
        what: sum(outcomes[row.name]["outcome"] == what for row in rows) for what in ("killed", "survived", "broken")
    }
    print(f"{len(rows)} of {len(ROWS)} rows: " + ", ".join(f"{n} {what}" for what, n in count.items()) + f" ({REPORT})")
    return int(count["killed"] < len(rows))


def main(arguments: Sequence[str]) -> int:
    """The command line; the exit code, 2 for a wrong one."""
    verb, *words = arguments or ("",)
    jobs = next((word.partition("=")[2] for word in words if word.startswith("--jobs=")), "1")
    words = [word for word in words if not word.startswith("--jobs=")]
    if verb not in ("list", "check", "run") or not jobs.isdigit() or int(jobs) < 1 or any(w[:1] == "-" for w in words):
        print(__doc__)
        return 2
    try:
        if verb == "run":
            return run(words, int(jobs))
        if verb == "list":
            for row in picked(words):
                print(f"{row.name:50}{row.file:45}{row.tests}")
            return 0
    except ValueError as error:
        print(error)
        return 2
    lines = wrong()
    print("\n".join(lines or [f"{len(ROWS)} rows apply"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
