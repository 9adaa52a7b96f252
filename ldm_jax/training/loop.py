"""The training loop: one flat function over a task, which reads top to bottom. It does not know which task it trains.

Exact resume: the state holds parameters, averages, optimizers, the step and the run's key; the data stream is a function of
(seed, batch number); the noise of step n is fold_in(key, n). A run killed at any moment and started again therefore ends
in the same bits as the run never interrupted, on the same number of devices.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import startup
from ldm_jax.config import config_file
from ldm_jax.data import contact_sheet
from ldm_jax.diffusion import seeds
from ldm_jax.kernels import heap, mesh, processes
from ldm_jax.plugins import Plugin
from ldm_jax.runs import checkpoint, lock, plugin_record, record, run
from ldm_jax.runs.log import Log
from ldm_jax.runs.stopped import Stopped
from ldm_jax.training import blocks, build, check, dataset, facts, init_from, open_stage, published, stopping
from ldm_jax.training.experiment import Experiment, Train
from ldm_jax.training.images import to_uint8
from ldm_jax.training.state import TrainState


def train(
    config: ConfigDict, workdir: str | os.PathLike, *, quiet: bool = False, in_use: Sequence[Plugin] = ()
) -> dict[str, Any]:
    """Train, or go on training, what `config` describes, in `workdir`. Returns {'step', 'finished', ...last metrics}.

    in_use: the plug-ins that the config needs, as plugins.load returned them; the run remembers them.

    Raises ValueError for a config that cannot run, or is not the one that `workdir` was started with; Stopped when the loss
    is not finite or a checkpoint cannot be written.
    """
    startup.start()
    if not os.fspath(workdir):
        raise ValueError("workdir is empty; expected a folder")
    workdir = pathlib.Path(workdir).absolute()
    experiment, shapes = check.check(config, workdir)
    main = processes.is_first()
    with lock.only_one(workdir) if main else contextlib.nullcontext(), stopping.Stop() as stop:
        plugin_record.check(workdir, in_use)
        record.write_or_compare(config, workdir, main)
        if main:
            plugin_record.write(workdir, in_use)
        try:
            return _train(experiment, workdir, shapes, main, quiet, stop, in_use)
        except stopping.Terminated:
            print("stopped by SIGTERM before the first step; run the same command again to go on", flush=True)
            return {"step": checkpoint.newest(workdir) or 0, "finished": False}


def _train(
    experiment: Experiment,
    workdir: pathlib.Path,
    shapes: TrainState,
    main: bool,
    quiet: bool,
    stop: stopping.Stop,
    in_use: Sequence[Plugin],
) -> dict[str, Any]:
    # --- how long, and whether there is anything to do ---
    batch_size, total = experiment.train.batch_size, experiment.steps
    say = (lambda text: print(text, flush=True)) if main and not quiet else (lambda text: None)
    start = checkpoint.to_go_on_from(workdir)
    if start >= total:
        say(f"{workdir}: finished at step {start} ({start * batch_size} images); nothing to do")
        return {"step": start, "finished": True}

    # --- mesh: whether the batch and the state fit it ---
    device_mesh = mesh.make_mesh(experiment.mesh.data, experiment.mesh.fsdp, experiment.mesh.tensor)
    mesh.check_batch(device_mesh, batch_size, experiment.train.accumulate)

    def shard(tree):
        return mesh.tree_shardings(tree, device_mesh, experiment.mesh.rules, experiment.mesh.min_size)

    shard(shapes)

    # --- the first stage, if there is one: trained here when it is missing ---
    stage = None
    if build.needs_stage(experiment):
        stage_dir = open_stage.place(experiment, workdir)
        if not _first_stage_is_ready(experiment, stage_dir, quiet, say, in_use):
            return {"step": start, "finished": False}
        stage = open_stage.load(stage_dir, experiment=experiment, workdir=workdir)
    if start:  # before a data set is encoded by another one
        meta = checkpoint.restore_meta(workdir, start)
        facts.check(workdir, facts.of_meta(meta), open_stage.facts_of(stage))
        if main:
            record.keep_place(experiment.first_stage.workdir, workdir)

    # --- data, task ---
    train, tune = build.sources(experiment)
    context = build.full_context(experiment, stage, train)
    task = build.task(experiment, context)
    for line in dataset.lines(experiment, train, tune):
        say(line)
    if main:
        dataset.write(workdir, train, tune)
    data = build.data(experiment, stage, workdir, device_mesh, train, tune, say, context.conditioning.needs)
    depends_on = open_stage.facts_of(stage) | facts.of_task(task.facts)

    # --- state: new, from another run's parameters, or the newest intact checkpoint ---
    key = seeds.key(experiment.seed)
    shapes = jax.eval_shape(task.init, key)
    shardings = shard(shapes)
    frozen = jax.device_put(task.frozen, shard(task.frozen))
    if start:
        state = checkpoint.restore_state(workdir, start, shapes, shardings)
        state = mesh.copied(state, shardings)
        facts.check(workdir, facts.of_meta(meta), depends_on)
        position, inherited = meta["batches"], init_from.inherited(meta)
        say(f"{workdir}: going on from step {start} of {total}")
        precision = meta["precision"] if "precision" in meta else experiment.dtype
        if precision != experiment.dtype:
            say(f"{workdir}: was trained in {precision}, goes on in {experiment.dtype} on this machine")
    else:
        # Run once: compiling it well would take four times as long as compiling it fast (18 s against 4 on two CPU cores).
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        state = jax.jit(task.init, out_shardings=shardings).lower(key).compile(quick)(key)
        state, inherited = init_from.start(experiment, blocks.kind_of(experiment), state, shardings, say)
        position = 0
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
    averaged = experiment.average

    def params_of(state):
        return state.ema[averaged] if averaged else state.params

    validate = heap.settled(jax.jit(task.validate, out_shardings=replicated))
    pictures = heap.settled(jax.jit(task.pictures, out_shardings=replicated)) if task.pictures else None
    every = _intervals(experiment.train, total)

    # --- the loop ---
    batches = data.train_batches(position)
    keep_every = run.steps(experiment.train.keep_every, batch_size)
    writer = checkpoint.Writer(workdir, experiment.train.keep, keep_every)
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
                    values |= run_validation(
                        validate, data.tune_batches(), params_of(state), frozen, device_mesh, experiment.seed
                    )
                last = values
                log.write(n, n * batch_size, values)
                if pictures and (n % every["pictures"] == 0 or n == total) and not stopping:
                    _pictures(pictures, data, params_of(state), frozen, n, workdir, log)
                if n % every["checkpoint"] == 0 or n == total or stopping:
                    meta = {
                        "images": n * batch_size,
                        "batches": batches.position,
                        "precision": experiment.dtype,
                        "facts": depends_on,
                        **inherited,
                        "config": experiment.record,
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


# --- the first stage ---------------------------------------------------------------------------------------------------------


def _first_stage_is_ready(
    experiment: Experiment,
    stage_dir: pathlib.Path,
    quiet: bool,
    say: Callable[[str], None],
    in_use: Sequence[Plugin],
) -> bool:
    """Whether the first stage is there; it is trained here if it is missing. False where that training was stopped."""
    block = experiment.first_stage
    if published.is_published(stage_dir):
        measured = block.whitening == "measured"
        say(published.line(published.find(stage_dir, measured), measured))
        return True
    if not run.is_run(stage_dir) or not run.read(stage_dir).is_finished:
        if block.workdir:
            raise ValueError(
                f"config.first_stage.workdir={block.workdir} holds no finished first stage; train it to its "
                "end, or leave the key empty to have one trained in DIR/first_stage"
            )
        build.sources(experiment)  # what is wrong with this run's own data is said before, not after
        say(f"first stage: training {block.config} in {stage_dir}")
        return train(config_file.load(block.config), stage_dir, quiet=quiet, in_use=in_use)["finished"]
    if not block.workdir and (changes := record.changes(stage_dir, config_file.load(block.config))):
        say(f"{stage_dir} is finished and used as it is, though {block.config} has changed:")
        say("\n".join(changes))
    return True


# --- durations -----------------------------------------------------------------------------------------------------------


def _intervals(train: Train, total: int) -> dict[str, int]:
    """Steps between events, each a multiple of the log interval (0 in the config: at the end only)."""
    log = max(1, run.steps(train.log_every, train.batch_size))
    out = {"log": log}
    for name in ("validate", "pictures", "checkpoint"):
        steps = run.steps(getattr(train, f"{name}_every"), train.batch_size)
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


def run_validation(validate, batches, params, frozen, device_mesh, seed: int) -> dict[str, float]:
    """Mean of the task's validation metrics over the `tune` split; every process sees the same batches."""
    totals, weight = {}, 0.0
    key = seeds.key((seed + 1) % seeds.BOUND)
    for i, batch in enumerate(batches):
        valid = batch.pop("valid").astype(np.float64)
        rows = jax.device_get(
            validate(params, frozen, mesh.shard_global(batch, device_mesh), jax.random.fold_in(key, i))
        )
        for name, values in rows.items():
            totals[name] = totals.get(name, 0.0) + float(np.sum(np.asarray(values, np.float64) * valid))
        weight += float(valid.sum())
    return {name: value / weight for name, value in totals.items()}


def _pictures(pictures, data, params, frozen, step: int, workdir: pathlib.Path, log: Log) -> None:
    out = jax.device_get(pictures(params, frozen, data.picture_batch, jax.random.key(0)))
    if not log.main:
        return
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    for name, x in out.items():
        images = np.asarray(to_uint8(x))
        path = folder / ("data.png" if name == "data" else f"{name}_{step:07d}.png")
        contact_sheet.save(path, images, labels=data.picture_captions)
        log.picture(step, name, path)
