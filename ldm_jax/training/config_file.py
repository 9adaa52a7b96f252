"""Reading `--config=FILE.py[:ARG] --config.KEY=VALUE ...` into a locked ConfigDict, with ml_collections' own parser."""

import difflib
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags


def find(path: str) -> pathlib.Path:
    """A config file as named, from the current folder or from the folder that holds this package."""
    here = pathlib.Path(path)
    if here.is_file():
        return here.absolute()
    beside = pathlib.Path(__file__).parents[2] / path
    if beside.is_file():
        return beside
    near = sorted(p.name for p in here.parent.glob("*.py")) if here.parent.is_dir() else []
    close = difflib.get_close_matches(here.name, near, 1)
    hint = f"; did you mean {here.parent / close[0]}?" if close else ""
    raise FileNotFoundError(f"config file {path} does not exist{hint}")


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of every leaf."""
    out = []
    for name, value in config.items():
        out += keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return out


def load(spec: str, overrides: list[str] = ()) -> ConfigDict:
    """The locked config of FILE.py[:ARG] with `--config.KEY=VALUE` overrides.

    Raises FileNotFoundError for a missing file and ValueError for an unknown key (with the nearest one) or a value of another type.
    """
    path, _, arg = spec.partition(":")
    file = find(path)
    # Configs import their base as `configs.base`, from the folder above theirs or from this project.
    own, project = str(file.absolute().parents[1]), str(pathlib.Path(__file__).parents[2])
    if own not in sys.path:
        sys.path.insert(0, own)
    if project not in sys.path:
        sys.path.append(project)
    for word in overrides:
        if not word.startswith("--config.") or "=" not in word:
            raise ValueError(f"unknown argument {word!r}; overrides look like --config.train.batch_size=64")
    named = f"--config={file}" + (f":{arg}" if arg else "")
    try:
        known = keys(_parse(["ldm", named]))
        for word in overrides:
            key = word[len("--config.") :].partition("=")[0]
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"config {path} has no key {key!r}{hint}")
        return _parse(["ldm", named, *overrides])
    except (flags.Error, KeyError, AttributeError, TypeError, ImportError, SyntaxError) as error:
        # An error inside the file comes wrapped in a traceback, whose last line says what it was.
        said = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"config {spec}: {said[-1] if 'Traceback' in str(error) else said[0]}") from error


def _parse(argv: list[str]) -> ConfigDict:
    """The library reads overrides off sys.argv unless it is told otherwise; a first stage's config must not see them."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config
