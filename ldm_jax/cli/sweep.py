"""Run a study: many trainings or evaluations declared in one Python file, then a table and a plot of them.

  ldm sweep experiments/lr_width.py --workdir=runs/lr_width --dry-run          what would be run
  ldm sweep experiments/lr_width.py --workdir=runs/lr_width --workers=2        run it, two at a time
  ldm sweep experiments/lr_width.py --workdir=runs/lr_width --launcher=slurm --partition=gpu --gpus=1 --time=240

Each run has a folder DIR/runs/ID with its log, status and result; DIR/results.md, results.csv and the plots show all.
Stop it with Ctrl-C, or lose the machine: the same command goes on, finished runs are not repeated, and trainings resume
from their checkpoints. A run that fails is listed at the end (exit code 1); the others go on. Runs may be added to the
study file at any time.
"""

import argparse
import os
import pathlib
import shlex

from ldm_jax.cli import checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="experiments/NAME.py", help="a Python file with get_study()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's folder, one study each")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, their status and commands, and stop")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TERM",
        help="only runs that fit: KEY=VALUE (sampler=heun) or a part of the run's name; repeat it to narrow further",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again (else they stay failed)")
    parser.add_argument("--publish", metavar="DIR", help="copy the tables and plots there when done (experiments/NAME)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where runs go (local)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at a time (local: 1; slurm: as many as the cluster gives)",
    )
    local = parser.add_argument_group("with --launcher=local")
    local.add_argument("--devices", metavar="0,1,...", help="GPUs, one to each worker in turn (default: all see all)")
    slurm = parser.add_argument_group("with --launcher=slurm (each run is a job; DIR on a shared disk)")
    slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    slurm.add_argument("--account", metavar="NAME", help="default: yours")
    slurm.add_argument("--cpus", type=int, metavar="N", help="CPUs a run")
    slurm.add_argument("--gpus", type=int, metavar="N", help="GPUs a run")
    slurm.add_argument("--mem", type=float, metavar="GB", help="memory a run")
    slurm.add_argument("--time", type=int, metavar="MINUTES", help="time limit a run (60); a training resumes after it")
    slurm.add_argument(
        "--slurm", action="append", metavar="KEY=VALUE", help="any other sbatch option, such as qos=high; repeatable"
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.sweeps import first_stages
    from ldm_jax.sweeps.launchers import LAUNCHERS
    from ldm_jax.sweeps.queue import matches
    from ldm_jax.sweeps.run import run_study
    from ldm_jax.sweeps.study import load_study, make_runs

    checks.folder("workdir", args.workdir)
    if args.publish is not None:  # said now, and not when the last run is done
        checks.folder("publish", args.publish)
    study = load_study(args.study)
    workdir = pathlib.Path(args.workdir).resolve()
    if args.dry_run:
        _list(study, workdir, args.only)
        return 0
    if study.search is None:
        first_stages.check([run for run in make_runs(study, workdir) if matches(run, args.only)])
    launcher = LAUNCHERS[args.launcher](workdir, **_options(args))
    publish = pathlib.Path(args.publish) if args.publish else None
    return run_study(study, workdir, launcher, only=args.only, retry_failed=args.retry_failed, publish=publish)


def _options(args: argparse.Namespace) -> dict:
    """The launcher's keywords out of the flags that are set. Raises ValueError for the other launcher's flags."""
    keywords = {
        "local": {"devices": "devices"},
        "slurm": dict(partition="partition", account="account", cpus="cpus", gpus="gpus", mem="mem")
        | {"time": "minutes", "slurm": "options"},
    }
    options = {} if args.workers is None else {"workers": args.workers}
    for launcher, names in keywords.items():
        for name, keyword in names.items():
            value = getattr(args, name)
            if value is None:
                continue
            if launcher != args.launcher:
                raise ValueError(f"--{name} goes with --launcher={launcher}, not with --launcher={args.launcher}")
            options[keyword] = value
    if "devices" in options:
        options["devices"] = options["devices"].split(",")
    if "options" in options:
        wrong = [term for term in options["options"] if "=" not in term]
        if wrong:
            raise ValueError(f"--slurm takes KEY=VALUE, got {wrong[0]!r}")
        options["options"] = dict(term.split("=", 1) for term in options["options"])
    return options


def _list(study, workdir: pathlib.Path, only: list[str]) -> None:
    from ldm_jax.sweeps import records
    from ldm_jax.sweeps.queue import matches
    from ldm_jax.sweeps.study import make_runs

    if study.search is not None:
        print(f"{study.name}: {study.search.trials} trials that {study.direction} {study.objective} over")
        for key, values in study.search.space.items():
            print(f"  {key}: {values}")
        return
    runs = make_runs(study, workdir)
    chosen = [run for run in runs if matches(run, only)]
    print(f"{study.name}: {len(chosen)} of {len(runs)} runs" if only else f"{study.name}: {len(runs)} runs")
    for run in chosen:
        print(f"{records.status(run):8} {run.id}")
        for command in run.commands:
            print("         " + shlex.join(["python", *command[1:]] if os.path.isabs(command[0]) else command))
