"""The training loop: one flat function over a task. It reads top to bottom and knows nothing of what is trained.

Exact resume: the state holds parameters, averages, optimizers, the step and the run's key; the data stream is a function of
(seed, batch number); the noise of step n is fold_in(key, n). A run killed at any moment and started again therefore ends
in the same bits as the run never interrupted, on the same number of devices.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import startup
from ldm_jax.data import grid
from ldm_jax.diffusion import seeds
from ldm_jax.kernels import heap, mesh
from ldm_jax.training import check, checkpoint, config_file, ema, experiment, published
from ldm_jax.training import state as states
from ldm_jax.training.images import to_uint8
from ldm_jax.training.log import Log
from ldm_jax.training.stopped import Stopped

# Keys that change what is written or how fast, but not one number of the result: they may differ when a run goes on.
HARMLESS = (
    "mesh",
    "train.log_every",
    "train.keep",
    "train.keep_every",
    "train.checkpoint_every",
    "train.validate_every",
    "train.pictures_every",
    "input.num_threads",
    "input.prefetch",
    "sampler",
    "first_stage.workdir",  # where it lies; what it is stands in the checkpoint
    "first_stage.latents",
    "first_stage.preview",
)


def train(config: ConfigDict, workdir: str | os.PathLike, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or go on training, what `config` describes, in `workdir`. Returns {'step', 'finished', ...last metrics}.

    Raises ValueError for a config that cannot run, or is not the one that `workdir` was started with; Stopped when the loss
    is not finite or a checkpoint cannot be written.
    """
    startup.start()
    if not os.fspath(workdir):
        raise ValueError("workdir is empty; expected a folder")
    workdir = pathlib.Path(workdir).absolute()
    shapes = check.check(config, workdir)
    main = jax.process_index() == 0
    with _only_one(workdir) if main else contextlib.nullcontext(), _Stop() as stop:
        _same_config(config, workdir, main)
        try:
            return _train(config, workdir, shapes, main, quiet, stop)
        except _Terminated:
            print("stopped by SIGTERM before the first step; run the same command again to go on", flush=True)
            return {"step": checkpoint.newest(workdir) or 0, "finished": False}


def _train(
    config: ConfigDict, workdir: pathlib.Path, shapes: states.TrainState, main: bool, quiet: bool, stop: "_Stop"
) -> dict[str, Any]:
    # --- how long, and whether there is anything to do ---
    batch_size, total = config.train.batch_size, experiment.steps_of(config)
    say = (lambda text: print(text, flush=True)) if main and not quiet else (lambda text: None)
    start = checkpoint.to_go_on_from(workdir)
    if start >= total:
        say(f"{workdir}: finished at step {start} ({start * batch_size} images); nothing to do")
        return {"step": start, "finished": True}

    # --- mesh: whether the batch and the state fit it ---
    device_mesh = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh.check_batch(device_mesh, batch_size, config.train.accumulate)
    rules = tuple((pattern, tuple(axes)) for pattern, axes in config.mesh.rules)

    def shard(tree):
        return mesh.tree_shardings(tree, device_mesh, rules, config.mesh.min_size)

    shard(shapes)

    # --- the first stage, if there is one: trained here when it is missing ---
    first_stage = None
    if experiment.needs_first_stage(config):
        first_stage_dir = experiment.first_stage_workdir(config, workdir)
        if published.is_published(first_stage_dir):
            measured = config.first_stage.whitening == "measured"
            say(published.line(published.find(first_stage_dir, measured), measured))
        elif not experiment.is_finished(first_stage_dir):
            if config.first_stage.workdir:
                raise ValueError(
                    f"config.first_stage.workdir={config.first_stage.workdir} holds no finished first stage; train it to its "
                    "end, or leave the key empty to have one trained in DIR/first_stage"
                )
            experiment.sources(config)  # what is wrong with this run's own data is said before, not after
            say(f"first stage: training {config.first_stage.config} in {first_stage_dir}")
            own = config_file.load(config.first_stage.config)
            if not train(own, first_stage_dir, quiet=quiet)["finished"]:
                return {"step": start, "finished": False}
        elif not config.first_stage.workdir:
            changed = _changes(first_stage_dir, config_file.load(config.first_stage.config))
            if changed:
                say(f"{first_stage_dir} is finished and used as it is, though {config.first_stage.config} has changed:")
                say("\n".join(changed))
        first_stage = experiment.load_first_stage(first_stage_dir, config=config, workdir=workdir)
    if start:  # before a data set is encoded by another one
        meta = checkpoint.restore_meta(workdir, start)
        experiment.same_first_stage(workdir, meta, first_stage)
        if main:
            _keep_place(config, workdir)

    # --- data, task ---
    built = experiment.build(config, workdir, first_stage, device_mesh, say)
    task = built.task

    # --- state: new, from another run's parameters, or the newest intact checkpoint ---
    key = seeds.key(config.seed)
    shapes = jax.eval_shape(task.init, key)
    shardings = shard(shapes)
    frozen = jax.device_put(task.frozen, shard(task.frozen))
    judges = experiment.judges(task)
    if start:
        state = checkpoint.restore_state(workdir, start, shapes, shardings)
        state = mesh.own(state, shardings)
        position = meta["batches"]
        experiment.same_judges(workdir, meta, judges)
        latents_of = meta.get("latents_of")
        say(f"{workdir}: going on from step {start} of {total}")
        precision = meta.get("precision", experiment.dtype(config))
        if precision != experiment.dtype(config):
            say(f"{workdir}: was trained in {precision}, goes on in {experiment.dtype(config)} on this machine")
    else:
        # Run once: compiling it well would take four times as long as compiling it fast (18 s against 4 on two CPU cores).
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        state = jax.jit(task.init, out_shardings=shardings).lower(key).compile(quick)(key)
        state = experiment.init_from(config, state, shardings, say)
        position, latents_of = 0, experiment.latents_of(config)
        size = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
        say(
            f"{workdir}: {total} steps of {batch_size} images, {size:.2f}M parameters, {device_mesh.devices.size} device(s)"
        )

    # --- compiled functions ---
    replicated, by_row = mesh.replicated(device_mesh), mesh.batch_sharding(device_mesh)
    step = heap.settled(
        jax.jit(
            task.step,
            in_shardings=(shardings, shard(frozen), by_row),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
    )
    averaged = ema.name(config.ema.half_lives[0]) if config.ema.half_lives else None

    def params_of(state):
        return state.ema[averaged] if averaged else state.params

    validate = heap.settled(jax.jit(task.validate, out_shardings=replicated))
    pictures = heap.settled(jax.jit(task.pictures, out_shardings=replicated)) if task.pictures else None
    every = _intervals(config, total)

    # --- the loop ---
    batches = built.train_batches(position)
    writer = checkpoint.Writer(workdir, config.train.keep, experiment.steps(config.train.keep_every, batch_size))
    log = Log(workdir, main=main, step=start, total_images=total * batch_size, images=start * batch_size, quiet=quiet)
    pending, waited, since, saved, last = [], 0.0, time.perf_counter(), start, {}
    compiled = False
    try:
        with stop.between_steps():
            for n in range(start + 1, total + 1):
                before = time.perf_counter()
                batch = mesh.shard_batch(next(batches), device_mesh)
                waited += time.perf_counter() - before
                state, metrics = step(state, frozen, batch)
                pending.append(metrics)
                if not compiled:  # The rate is that of steps, not of the compiler.
                    jax.block_until_ready(metrics)
                    compiled, since, waited, begun = True, time.perf_counter(), 0.0, len(pending)
                stopping = stop.agreed(n % every["log"] == 0)
                if not (n % every["log"] == 0 or n == total or stopping):
                    continue

                # A log line: the only place where the host waits for the device.
                values = _mean(jax.device_get(pending), first=n - len(pending) + 1, workdir=workdir, saved=saved)
                elapsed = max(time.perf_counter() - since, 1e-9)
                counted = len(pending) - begun
                if counted:
                    values["images_per_second"] = counted * batch_size / elapsed
                    values["data_wait"] = waited / elapsed
                pending, begun = [], 0
                if (n % every["validate"] == 0 or n == total) and not stopping:
                    values |= run_validation(validate, built, params_of(state), frozen, device_mesh, config)
                last = values
                log.write(n, n * batch_size, values)
                if pictures and (n % every["pictures"] == 0 or n == total) and not stopping:
                    _pictures(pictures, built, params_of(state), frozen, n, workdir, log)
                if n % every["checkpoint"] == 0 or n == total or stopping:
                    meta = {
                        "images": n * batch_size,
                        "batches": batches.position,
                        "precision": experiment.dtype(config),
                        **experiment.facts_of(first_stage),
                        "latents_of": latents_of,
                        "judges": judges,
                        "config": as_json(config),
                    }
                    try:
                        saved = writer.save(state, meta)
                    except OSError as error:
                        raise Stopped(f"{error}; the newest checkpoint is still step {saved}") from error
                if stopping:
                    log.say(f"stopped by {stop.name} at step {n}, saved; run the same command again to go on")
                    return {"step": n, "finished": False, **last}
                waited, since = 0.0, time.perf_counter()
    finally:
        log.close()
        writer.close()
    return {"step": total, "finished": True, **last}


# --- durations -----------------------------------------------------------------------------------------------------------


def _intervals(config: ConfigDict, total: int) -> dict[str, int]:
    """Steps between events, each a multiple of the log interval (0 in the config: at the end only)."""
    log = max(1, experiment.steps(config.train.log_every, config.train.batch_size))
    out = {"log": log}
    for name in ("validate", "pictures", "checkpoint"):
        steps = experiment.steps(config.train[f"{name}_every"], config.train.batch_size)
        out[name] = max(1, round(steps / log)) * log if steps else total
    return out


# --- parts of the loop ---------------------------------------------------------------------------------------------------


def _mean(pending: list[dict[str, np.ndarray]], first: int, workdir: pathlib.Path, saved: int) -> dict[str, float]:
    """Mean of each metric since the last log line. Raises Stopped when a loss or a gradient was not finite."""
    stacked = {name: np.array([m[name] for m in pending], np.float64) for name in pending[0]}
    for name in sorted(stacked, key=lambda name: name != "loss"):
        bad = np.flatnonzero(~np.isfinite(stacked[name]))
        if bad.size and ("loss" in name or "grad_norm" in name):
            kept = (
                f"the last good checkpoint is {checkpoint.folder(workdir) / str(saved)}"
                if saved
                else "none was saved yet"
            )
            raise Stopped(
                f"{name} is {stacked[name][bad[0]]} at step {first + bad[0]} "
                f"(seen between steps {first} and {first + len(pending) - 1}); {kept}"
            )
    return {name: float(values.mean()) for name, values in stacked.items()}


def run_validation(validate, built, params, frozen, device_mesh, config) -> dict[str, float]:
    """Mean of the task's validation metrics over the `tune` split; every process sees the same batches."""
    totals, weight = {}, 0.0
    key = seeds.key((config.seed + 1) % seeds.BOUND)
    for i, batch in enumerate(built.tune_batches()):
        valid = batch.pop("valid").astype(np.float64)
        rows = jax.device_get(
            validate(params, frozen, mesh.shard_global(batch, device_mesh), jax.random.fold_in(key, i))
        )
        for name, values in rows.items():
            totals[name] = totals.get(name, 0.0) + float(np.sum(np.asarray(values, np.float64) * valid))
        weight += float(valid.sum())
    return {name: value / weight for name, value in totals.items()}


def _pictures(pictures, built, params, frozen, step: int, workdir: pathlib.Path, log: Log) -> None:
    out = jax.device_get(pictures(params, frozen, built.picture_batch, jax.random.key(0)))
    if not log.main:
        return
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    for name, x in out.items():
        images = np.asarray(to_uint8(x))
        path = folder / ("data.png" if name == "data" else f"{name}_{step:07d}.png")
        grid.save(path, images, labels=built.picture_captions)
        log.picture(step, name, path)


class _Terminated(BaseException):
    """SIGTERM while nothing is trained yet: whatever is being prepared (latents, a compilation) is left where it stands."""


class _Stop(contextlib.AbstractContextManager):
    """SIGTERM and Ctrl-C: at once before training; between steps, after the one under way, and a second Ctrl-C at once."""

    def __init__(self):
        self.name, self.training = None, False

    def _handle(self, number, frame):
        if number == signal.SIGINT and (self.name == "SIGINT" or not self.training):
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if not self.training:
            raise _Terminated

    def __enter__(self):
        try:
            self.old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # Not the main thread: whoever owns it handles signals.
            self.old = {}
        return self

    def __exit__(self, *exc):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def between_steps(self):
        """From here on a signal waits for the end of a step."""
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def agreed(self, boundary: bool) -> bool:
        """Whether to stop now: at once on one process, at the next log line, all together, on several."""
        if jax.process_count() == 1:
            return self.name is not None
        if not boundary:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.name is not None)).any())


@contextlib.contextmanager
def _only_one(workdir: pathlib.Path):
    """Hold the run's lock: two trainings in one folder would write over each other."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir} is in use by another training process") from None
        yield


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _changes(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """What differs between DIR/config.json and this config, a line each, but for what changes no number of the result."""
    # Read as a run: a key that came since the run was started has its default.
    old, now = _flat(as_json(experiment.read_config(workdir))), _flat(as_json(config))
    missing = object()
    return [
        f"  {key}: {old.get(key, 'not there')!r} there, {now.get(key, 'not there')!r} here"
        for key in sorted(old | now)
        if old.get(key, missing) != now.get(key, missing)
        and not any(key == h or key.startswith(h + ".") for h in HARMLESS)
    ]


def _keep_place(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Write down where the first stage of a run lies now, which goes on from its checkpoint."""
    path = workdir / "config.json"
    kept = json.loads(path.read_text())
    if kept.get("first_stage", {}).get("workdir") != config.first_stage.workdir:
        kept["first_stage"]["workdir"] = config.first_stage.workdir
        checkpoint.write_text(path, json.dumps(kept, indent=1) + "\n")


def _same_config(config: ConfigDict, workdir: pathlib.Path, main: bool) -> None:
    """Write DIR/config.json, or hold this config against the one there. Raises ValueError with the difference.

    Without a checkpoint there is nothing to hold on to: a config that was refused may be put right.
    """
    path = workdir / "config.json"
    if path.exists() and checkpoint.steps(workdir):
        changed = _changes(workdir, config)
        if changed:
            raise ValueError(
                f"{workdir} was started with another config; take another --workdir (and --config.init_from.workdir to "
                "start from its parameters), or undo:\n" + "\n".join(changed)
            )
    elif main:
        checkpoint.write_text(path, json.dumps(as_json(config), indent=1) + "\n")
