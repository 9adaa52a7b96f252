"""DIR/plugins.json and DIR/plugins/: the plug-ins that a run was trained with, and a copy of each.

A run is read with its plug-ins. Its own copy of each is loaded, so a run moves to another machine with them. Where the file that the
run was trained with is still there and has changed, the run is refused, because nobody can know which of the two is meant: --plugin
names one. The new file serves drawing and measuring alone. Training goes on only with the content that it was begun with.
"""

import json
import os
import pathlib
from collections.abc import Iterable

from ldm_jax import plugins
from ldm_jax.plugins import Plugin
from ldm_jax.runs import checkpoint
from ldm_jax.weights import files


def recorded(workdir: pathlib.Path) -> list[Plugin]:
    """The plug-ins of DIR/plugins.json, each by the path that it had; [] where there is no such file.

    Raises ValueError for any other content.
    """
    path = workdir / "plugins.json"
    if not path.is_file():
        return []
    try:
        return [Plugin(row["path"], row["sha256"], named=False) for row in files.read_json(path)["plugins"]]
    except (KeyError, TypeError):
        raise ValueError(f"{path}: expected {{'plugins': [{{'path': ..., 'sha256': ...}}, ...]}}") from None


def copy_of(workdir: pathlib.Path, plugin: Plugin) -> pathlib.Path:
    """Where a run keeps its copy of a plug-in."""
    return workdir / "plugins" / plugin.name


def load(workdir: pathlib.Path) -> list[Plugin]:
    """Load the plug-ins of a run, but for those in whose place --plugin named a file of the same name, and return those in use.

    Raises ValueError for a file that has changed since, or a copy that is damaged or missing.
    """
    in_use = []
    for plugin in recorded(workdir):
        named = [other for other in plugins.loaded() if other.named and other.name == plugin.name]
        same = [other for other in plugins.loaded() if other.sha256 == plugin.sha256]
        if not same and not named:
            copy, original = copy_of(workdir, plugin), pathlib.Path(plugin.path)
            if original.is_file() and plugins.read(original)[2] != plugin.sha256:
                raise ValueError(
                    f"the plug-in {original} has changed since {workdir} was trained with it; expected --plugin={copy}, what it "
                    f"was, or --plugin={original}, what it is, to draw or to measure with"
                )
            if not copy.is_file():
                raise ValueError(f"{copy} is missing, a plug-in that {workdir} was trained with")
            if plugins.read(copy)[2] != plugin.sha256:
                raise ValueError(f"{copy} has changed: it is not the plug-in that {workdir} was trained with")
            same = plugins.load([copy], named=False)
        in_use += (same or named)[:1]
    return in_use


def check(workdir: pathlib.Path, in_use: Iterable[Plugin]) -> None:
    """Raise ValueError for a plug-in with which a run that has a checkpoint cannot go on: one of the same name and another content."""
    if not checkpoint.steps(workdir):
        return
    content = {plugin.name: plugin.sha256 for plugin in recorded(workdir)}
    for plugin in in_use:
        if content.get(plugin.name, plugin.sha256) != plugin.sha256:
            raise ValueError(
                f"{workdir} was trained with another {plugin.name} than {plugin.path}; expected --plugin={copy_of(workdir, plugin)} "
                "to go on with, or another --workdir"
            )


def write(workdir: pathlib.Path, in_use: Iterable[Plugin]) -> None:
    """Write DIR/plugins.json and the copies. A run that has a checkpoint keeps what it has, and gets what is new."""
    before = {plugin.name: plugin for plugin in recorded(workdir)} if checkpoint.steps(workdir) else {}
    rows = {plugin.name: plugin for plugin in in_use} | before
    if not rows:
        return
    for plugin in rows.values():
        copy = copy_of(workdir, plugin)
        if plugin.content and not (copy.is_file() and copy.read_bytes() == plugin.content):
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_suffix(".partial")
            partial.write_bytes(plugin.content)
            os.replace(partial, copy)
    text = json.dumps({"plugins": [{"path": p.path, "sha256": p.sha256} for p in rows.values()]}, indent=1)
    checkpoint.write_text(workdir / "plugins.json", text + "\n")
