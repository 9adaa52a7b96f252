"""Plug-ins: Python files that add rows to the tables of this package.

    from ldm_jax.diffusion.samplers import SAMPLERS
    SAMPLERS["mine"] = make_mine

A plug-in is executed once; what it adds counts from then on. It is one file, and needs nothing that lies beside it. It may add
rows, and may not replace one: every table of the package, a dict whose name is in capitals, is compared before and after. A plug-in
that fails leaves the tables as they were. docs/plugins.md has examples. How a run remembers its plug-ins: runs/plugin_record.py.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Installed packages name the modules that are plug-ins by entry points of this group.
GROUP = "ldm_jax.plugins"


class Plugin(NamedTuple):
    """A plug-in: its absolute path, the sha256 of its content, whether the user named it (a run may have), and its content."""

    path: str
    sha256: str
    named: bool = True
    content: bytes = b""

    @property
    def name(self) -> str:
        """The file's name. A run has one plug-in of a name."""
        return os.path.basename(self.path)


_loaded: dict[str, Plugin] = {}  # by sha256
_installed: set[str] = set()  # modules of entry points


def loaded() -> list[Plugin]:
    """The files that were loaded in this process, in this order."""
    return list(_loaded.values())


def contents(in_use: Iterable[Plugin]) -> dict[str, str]:
    """{file name: sha256} of plug-ins, as records of images and figures say it."""
    return {plugin.name: plugin.sha256 for plugin in in_use}


def read(path: str | os.PathLike) -> tuple[pathlib.Path, bytes, str]:
    """(absolute path, content, sha256 of the content) of a plug-in's file. Raises FileNotFoundError, or ValueError for other files."""
    file = pathlib.Path(path).absolute()
    if not os.fspath(path):
        raise ValueError("--plugin is empty; expected FILE.py")
    if file.is_dir() or file.suffix != ".py":
        raise ValueError(f"plug-in {path} is not a Python file; expected FILE.py")
    if not file.is_file():
        raise FileNotFoundError(f"plug-in {path} does not exist")
    content = file.read_bytes()
    return file, content, hashlib.sha256(content).hexdigest()


def load(paths: Iterable[str | os.PathLike], named: bool = True) -> list[Plugin]:
    """Execute each of these files, unless a file of the same content is loaded already, and return them as Plugins.

    Raises FileNotFoundError for a missing file, and ValueError with the file and the line for whatever goes wrong in one: an error, the
    end of the program, a name of a table that exists. Raises ValueError too for two different files of one name.
    """
    files = {}
    for path in paths:
        file, content, sha256 = read(path)
        if files.setdefault(file.name, sha256) != sha256:
            raise ValueError(f"two plug-ins are called {file.name}; expected different names")
        if sha256 not in _loaded:
            _execute(file, content, sha256, f"plug-in {path}")
        if sha256 not in _loaded or named:
            _loaded[sha256] = Plugin(str(file), sha256, named, content)
    return [_loaded[sha256] for sha256 in files.values()]


def load_installed() -> None:
    """Import the modules that installed packages name as plug-ins. Raises ValueError for whatever goes wrong in one."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.value in _installed:
            continue
        label = f"plug-in {entry.name} ({entry.value})"
        spec = None
        with contextlib.suppress(Exception):  # the import itself says what is wrong
            spec = importlib.util.find_spec(entry.module)
        file = pathlib.Path(spec.origin) if spec and spec.origin else pathlib.Path(entry.value)
        _guarded(file, file.read_bytes() if file.is_file() else b"", label, entry.load)
        _installed.add(entry.value)


# --- executing a file ------------------------------------------------------------------------------------------------------


def _execute(file: pathlib.Path, content: bytes, sha256: str, label: str) -> None:
    # In sys.modules, where dataclasses and flax look up the module of a class. No bytecode is written beside the file.
    name = f"ldm_jax_plugin_{sha256[:16]}"
    module = types.ModuleType(name)
    module.__file__ = str(file)

    def run() -> None:
        code = compile(content, str(file), "exec", dont_inherit=True)
        sys.modules[name] = module
        exec(code, module.__dict__)

    try:
        _guarded(file, content, label, run)
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _guarded(file: pathlib.Path, content: bytes, label: str, run: Callable[[], Any]) -> None:
    """Call run(), which executes this file. Raises ValueError, with the tables as they were, if it fails or replaces a row."""
    from ldm_jax.config import config_file

    tables: list[tuple[str, dict, dict]] = []
    try:
        tree = ast.parse(content, str(file))
        # The tables that the file adds to have to be there before it, for the comparison.
        _import_tables(tree)
        tables = _tables()
        run()
        for table, now, before in tables:
            for key in before:
                if key not in now or now[key] is not before[key]:
                    lines = [
                        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == key
                    ]
                    where = f", line {lines[0]}" if lines else ""
                    raise _Replaced(f"{where}: {key!r} is in {table} already; expected another name")
    except KeyboardInterrupt:
        _restore(tables)
        raise
    except _Replaced as error:
        _restore(tables)
        raise ValueError(f"{label}{error}") from None
    except BaseException as error:  # SystemExit as well: it would end the program in silence
        _restore(tables)
        text = config_file.words_of(error, file, expected="it to add rows to tables")
        raise ValueError(f"{label}{config_file.line_of(error, file)}: {text}") from error


class _Replaced(Exception):
    """A row of a table is no longer what it was."""


def _import_tables(tree: ast.Module) -> None:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        if name.partition(".")[0] == "ldm_jax":
            with contextlib.suppress(ImportError):  # a name that is no module, or a mistake that the file itself meets
                importlib.import_module(name)


def _tables() -> list[tuple[str, dict, dict]]:
    """(name, table, its rows now) of every dict in capitals of every module of this package that is imported, each once."""
    tables = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ldm_jax":
            for attribute, value in list(vars(module).items()):
                if attribute.isupper() and isinstance(value, dict):
                    tables.setdefault(id(value), (attribute, value, dict(value)))
    return list(tables.values())


def _restore(tables: list[tuple[str, dict, dict]]) -> None:
    for _, table, before in tables:
        # By identity: rows may be arrays, of which == is no answer.
        if table.keys() != before.keys() or any(table[key] is not value for key, value in before.items()):
            table.clear()
            table.update(before)
