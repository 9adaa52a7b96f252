"""Reading `--config=FILE.py[:WORDS] --config.KEY=VALUE ...` into a locked ConfigDict that has every key of configs/base.py.

A config file is a program. Whatever goes wrong in it is one line with the file and the line number, and nothing that it put on
sys.path or into `configs` outlives the reading. Overrides are parsed by ml_collections.
"""

import ast
import contextlib
import difflib
import functools
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ldm_jax.config import config_keys
from ldm_jax.config.config_keys import Argument

# configs/ and experiments/ lie beside this package, or, where a wheel was installed, inside it (setup.py).
SHARE = pathlib.Path(__file__).parents[1] / "share"
PROJECT = SHARE if SHARE.is_dir() else SHARE.parents[1]


def find(path: str) -> pathlib.Path:
    """A config file as named, from the current folder or from this project."""
    here = pathlib.Path(path)
    for file in (here.absolute(), PROJECT / path):
        if file.is_file():
            if file.suffix != ".py":
                raise ValueError(f"config file {path} is not a Python file; expected FILE.py with get_config()")
            return file
    near = sorted(
        {p.name for folder in (here.parent, PROJECT / here.parent) for p in folder.glob("*.py") if p.is_file()}
    )
    close = difflib.get_close_matches(here.name, near, 1)
    hint = f"; did you mean {here.parent / close[0]}?" if close else ""
    raise FileNotFoundError(f"config file {path or repr(path)} does not exist{hint}")


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of every leaf."""
    out = []
    for name, value in config.items():
        out += keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return out


@functools.cache
def _base() -> ConfigDict:
    file = PROJECT / "configs" / "base.py"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it says which keys a config has, and comes with this package")
    return _run(file, "", str(file)).lock()


def base() -> ConfigDict:
    """configs/base.py of this project: every key that a config has, with its default."""
    return _base()


def load(
    spec: str,
    overrides: list[str] = (),
    arguments: Callable[[ConfigDict], Mapping[str, Argument]] | None = None,
) -> ConfigDict:
    """The locked config of FILE.py[:WORDS] with `--config.KEY=VALUE` overrides.

    What the file leaves out has the default of configs/base.py. An override may also name an argument of a constructor that the file
    leaves out: arguments(config) lists these by their dotted key (training.blocks.arguments). The config then holds that one key more;
    the other arguments stay out, so that a run's config is what its file and its command line spell out.

    Raises FileNotFoundError for a missing file and ValueError for an error in it, for an unknown key (with the nearest one) and for a
    value of another type or out of range.
    """
    path, _, words = spec.partition(":")
    return complete(_run(find(path), words, path), path, overrides, arguments)


def complete(
    config: ConfigDict,
    path: str,
    overrides: list[str] = (),
    arguments: Callable[[ConfigDict], Mapping[str, Argument]] | None = None,
) -> ConfigDict:
    """The locked config with every key of configs/base.py and these overrides; messages call it `path`. See `load`.

    The config that is passed in is changed. Raises ValueError as `load`.
    """
    config_keys.check_names(config, base())
    config_keys.complete(config, base())
    # The file's own mistakes come first: those of the command line can only be judged against a right file.
    config_keys.check_values(config, base())
    if overrides:
        config = _override(config, path, overrides, arguments)
        config_keys.check_names(config, base())
        config_keys.complete(config, base())
        config_keys.check_values(config, base())
    return config.lock()


def _override(
    config: ConfigDict,
    path: str,
    overrides: list[str],
    arguments: Callable[[ConfigDict], Mapping[str, Argument]] | None,
) -> ConfigDict:
    present, seen, absent = keys(config), set(), {}
    # A block without a leaf, such as sampler.options, is set as a whole: --config.sampler.options="{'eta': 0.5}"; or its keys one by
    # one, --config.sampler.options.eta=0.5, like the arguments of a constructor.
    present += [
        f"{name}.{key}"
        for name, block in config.items()
        if isinstance(block, ConfigDict)
        for key, value in block.items()
        if isinstance(value, ConfigDict) and not len(value)
    ]
    for word in overrides:
        if not word.startswith("--config.") or "=" not in word:
            raise ValueError(f"unknown argument {word!r}; overrides look like --config.train.batch_size=64")
        key, _, text = word[len("--config.") :].partition("=")
        if key in seen:
            raise ValueError(f"--config.{key} is there twice; expected it once")
        seen.add(key)
        block, _, argument = key.partition(".")
        outer = key.rpartition(".")[0]
        if key in present and outer not in absent:
            continue
        constructed = block in (*config_keys.OPEN, *config_keys.EXTENSIBLE) or _is_inner(config, key)
        if arguments is None or not argument or not (constructed or _is_inner(config, outer)):
            raise _no_key(path, key, present)
        absent[key] = text
    config = _with_values(config, path, [word for word in overrides if word[9:].partition("=")[0] not in absent])
    if not absent:
        return config
    # The names of the constructors may be overridden too, so their arguments are looked up in the overridden config.
    takes = arguments(config)
    for key, text in absent.items():
        if key not in takes:
            outer, _, last = key.rpartition(".")
            if _is_inner(config, outer):
                beside = [name.rpartition(".")[2] for name in takes if name.rpartition(".")[0] == outer]
                raise ValueError(f"config.{key} is unknown{config_keys.near(last, beside)}")
            raise _no_key(path, key, [*present, *takes])
        value = config_keys.parse(text, takes[key].hint)
        config_keys.check_value(f"config.{key}", value, takes[key].hint, takes[key].limits)
        *parents, last = key.split(".")
        block = config
        for name in parents:
            if name not in block or not isinstance(block[name], ConfigDict):  # None, or True for a block without keys
                block[name] = ConfigDict()
            block = block[name]
        block[last] = value
    return config


def _is_inner(config: ConfigDict, key: str) -> bool:
    """Whether a dotted key names a block inside a block, such as sampler.options."""
    name, _, inner = key.partition(".")
    return bool(inner) and isinstance(config.get(name), ConfigDict) and isinstance(config[name].get(inner), ConfigDict)


def _no_key(path: str, key: str, names: list[str]) -> ValueError:
    close = difflib.get_close_matches(key, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ValueError(f"config {path} has no key {key!r}{hint}")


def _with_values(config: ConfigDict, path: str, overrides: list[str]) -> ConfigDict:
    """The config with overrides of keys that it has; their texts are parsed by ml_collections."""
    # By default the library reads overrides from sys.argv; those are the run's, and a first stage's config must not get them.
    argv, values = ["ldm", *overrides], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=False, sys_argv=argv)
        values(argv)
        return values.config
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"config {path}: {lines[0]}") from error


# --- running a file ------------------------------------------------------------------------------------------------------


def _run(file: pathlib.Path, words: str, path: str) -> ConfigDict:
    """get_config(words) of a file, unlocked. Raises ValueError with the line of the file that is to blame."""
    try:
        _no_key_twice(file)
        with _importable(file):
            spec = importlib.util.spec_from_file_location(f"ldm_jax_config_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            make = getattr(module, "get_config", None)
            if not callable(make):
                raise _Wrong("it has no function get_config(arg)")
            if words and not inspect.signature(make).parameters:
                raise _Wrong(f"{words!r} after the colon, but its get_config() takes no words")
            config = make(words) if words else make()
    except _Wrong as error:
        raise ValueError(f"config {path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit as well: a config that ends the program ends it in silence
        text = words_of(error, file, expected="it to return a config") + _hint(error, file)
        raise ValueError(f"config {path}{line_of(error, file)}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config {path}: get_config() returned {type(config).__name__}; expected the ConfigDict of configs.base.get_config()"
        )
    if not len(config):
        raise ValueError(
            f"config {path}: get_config() returned an empty config; it starts from configs.base.get_config()"
        )
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config.unlock()


class _Wrong(Exception):
    """What is wrong with the file as a whole."""


@contextlib.contextmanager
def _importable(file: pathlib.Path) -> Iterator[None]:
    """`import configs.NAME` reads from the folder above the file's own, then from this project; nothing of it stays."""

    def ours(name: str) -> bool:
        return name == "configs" or name.startswith("configs.")

    path, before = list(sys.path), {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    sys.path[:] = [str(file.parents[1]), *path, str(PROJECT)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


def _no_key_twice(file: pathlib.Path) -> None:
    """Of a key written twice in one {...} Python takes the last without a word."""
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        seen = set()
        for key in node.keys if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value in seen:
                raise _Wrong(f"line {key.lineno}: {key.value!r} is twice in one block; expected it once")
            seen |= {key.value} if isinstance(key, ast.Constant) else set()


def line_of(error: BaseException, file: pathlib.Path) -> str:
    """', line N' of the file, the innermost one that the error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    line, traceback = 0, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line else ""


def words_of(error: BaseException, file: pathlib.Path, expected: str) -> str:
    """What an error in a file says, as one line; expected: what the file should do, where it ends the program."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).replace("\\n", " ").replace("\\'", "'")  # ConfigDict's own, which stand in quotes
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {text}); expected {expected}"
    if isinstance(error, SyntaxError):
        text = error.msg + (
            f" (line {error.lineno} of {error.filename})" if error.filename not in (None, str(file)) else ""
        )
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _hint(error: BaseException, file: pathlib.Path) -> str:
    if isinstance(error, ImportError) and (file.parents[1] / "configs" / "__init__.py").is_file():
        return f"; {file.parents[1]}/configs/__init__.py hides this project's configs, remove it"
    return ""
