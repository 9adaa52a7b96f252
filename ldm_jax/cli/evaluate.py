"""Generate images from a run's checkpoints and measure them: one JSON object a checkpoint, printed and appended to DIR/metrics.jsonl.

  ldm evaluate --workdir=runs/cifar10 --metrics=fid,kid,prdc,accuracy --num=10000 --features=inception:W.pth,classifier:runs/classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid,sfid,is --num=50000 --labels=random --features=inception --reference=ADM.npz
  ldm evaluate --workdir=runs/text --metrics=clip,cmmd --num=10000 --features=clip:FOLDER --prompts=captions.txt
  ldm evaluate --workdir=runs/quickstart --metrics=shapes --num=200
  ldm evaluate --workdir=runs/vae --metrics=psnr,ssim,rfid,kl,latents --num=5000 --features=dinov2:FOLDER
  ldm evaluate --workdir=sd-vae-ft-mse --data=configs/imagenet256_vae.py --out=evaluation --metrics=psnr,rfid --features=inception
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --watch --keep-best=fd_classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --samples=split:test

{metrics}

Images are made once for all metrics. Reference features are measured once and kept in DIR/statistics. A classifier's own run is
measured on the real images of its reporting split. A published autoencoder (a folder of diffusers', a file, hub:OWNER/NAME) is measured
on the reporting split of the config in --data, and all that is written goes to --out. A flag that nothing reads is refused.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ldm_jax.cli import checks, drawing, processes
from ldm_jax.cli.sample import add_sampling_arguments, settings_from

if TYPE_CHECKING:
    from ldm_jax.evaluation import subject, ways
    from ldm_jax.training.experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ldm_jax.evaluation import table

    parser.description = __doc__.format(metrics=table.listing())
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run, or a published autoencoder")
    parser.add_argument(
        "--data", default="", metavar="CONFIG.py", help="of a published autoencoder: whose images it is shown"
    )
    parser.add_argument("--metrics", required=True, metavar="A,B,...", help="what to measure, as listed above")
    parser.add_argument("--num", type=int, metavar="N", help="how many images (1000; of a classifier's run all)")
    parser.add_argument("--step", default="", metavar="N|all", help="which checkpoint; default: the newest")
    parser.add_argument(
        "--features",
        default="",
        metavar="A,B,...",
        help="feature networks: inception[:FILE|:download], classifier:DIR (a run), dinov2:DIR, clip:DIR (folders of save_pretrained)",
    )
    for flag in table.flags():
        parser.add_argument(f"--{flag.name}", type=flag.type, metavar=flag.metavar, help=flag.help)
    parser.add_argument(
        "--reference",
        default="",
        metavar="split:NAME|FILE.npz",
        help="what images are compared with: a split, an npz of images (arr_0) or of statistics (mu, sigma; mu_s, sigma_s for sfid); "
        "default: the reporting split",
    )
    parser.add_argument(
        "--samples", default="", metavar="FILE.npz|split:NAME", help="judge these images, generate none"
    )
    parser.add_argument(
        "--prompts", default="", metavar="FILE|split:NAME", help="captions to draw; default: the reporting split's"
    )
    parser.add_argument(
        "--labels",
        default="",
        metavar="equal|random|dataset",
        help="classes to draw: in turn (equal, the default), at random by --seed, or as frequent as in training",
    )
    parser.add_argument("--subset", type=int, metavar="N", help="images whose features are kept, at most (10000)")
    parser.add_argument("--out", default="", metavar="DIR", help="where grids go; default: DIR/pictures of the run")
    parser.add_argument("--watch", action="store_true", help="follow a training: each new checkpoint once, to its end")
    parser.add_argument(
        "--keep-best",
        default="",
        metavar="FIGURE",
        help="with --watch: keep the checkpoint that is best by it in DIR/best",
    )
    add_sampling_arguments(parser)
    parser.set_defaults(seed=None)
    processes.add_arguments(parser)


def on_command_line(args: argparse.Namespace) -> dict[str, object]:
    """The flags that the command line names, with their values."""
    return {flag: value for flag, value in vars(args).items() if value not in (None, "")}


def opened(args: argparse.Namespace) -> "subject.Subject":
    """What is in --workdir: a run, or a published autoencoder, whose figures go to --out."""
    from ldm_jax.evaluation import subject
    from ldm_jax.training import published
    from ldm_jax.weights import hub

    path = pathlib.Path(args.workdir)
    if args.data or not path.is_dir():
        try:
            path = published.place(args.workdir)
        except FileNotFoundError:
            if args.workdir.startswith(hub.PREFIX):
                raise
            raise FileNotFoundError(
                f"{args.workdir}: no such run; --workdir expects the folder of a run, or a published autoencoder"
            ) from None
    if not published.is_published(path):
        if args.data:
            raise ValueError(f"--data={args.data} goes with a published autoencoder; a run has data of its own")
        return subject.of_run(path)
    for flag in ("step", "ema", "watch", "keep_best", "samples"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with a run; {args.workdir} is a published autoencoder")
    if not args.data or not args.out:
        raise ValueError(
            f"{args.workdir} is a published autoencoder: expected --data=CONFIG.py, whose reporting images it is shown, and "
            "--out=DIR, where figures and pictures go"
        )
    return subject.of_published(path, args.data, pathlib.Path(args.out))


def check(args: argparse.Namespace, way: "ways.Way") -> None:
    """Raise ValueError for flags that are wrong by themselves, or do not go together: those of this verb alone."""
    checks.number("num", args.num, 2, checks.MOST_IMAGES)
    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
    drawing.classifier(args)
    if args.out:
        checks.folder("out", args.out)
    if args.step and args.step != "all" and not args.step.isdecimal():
        raise ValueError(f"--step={args.step}; expected a number or 'all'")
    one = ""
    if not way.several:
        one = "--samples" if args.samples else "a classifier's run, of which the newest checkpoint is measured"
    if args.step and (one or args.watch):
        raise ValueError(f"--step={args.step} does not go with {one or '--watch'}")
    if args.watch and one:
        raise ValueError(f"--watch does not go with {one}")
    if args.watch and args.distributed:
        raise ValueError("--watch does not go with --distributed: one process follows a training")
    if args.keep_best and not args.watch:
        raise ValueError(f"--keep-best={args.keep_best} goes with --watch")


def steps_of(
    args: argparse.Namespace, config: "Experiment", workdir: pathlib.Path, say: Callable[[str], None]
) -> Iterable[int | None]:
    """The checkpoints to measure; None is the newest."""
    from ldm_jax.evaluation import watch
    from ldm_jax.runs import checkpoint

    if args.watch:
        return watch.new_steps(workdir, config, say)
    if args.step != "all":
        return [int(args.step) if args.step else None]
    steps = sorted(checkpoint.intact(workdir))
    for step, wrong in steps:
        if wrong:
            say(f"checkpoint {step} is left out: {wrong}")
    return [step for step, wrong in steps if not wrong]


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax import plugins
    from ldm_jax.evaluation import evaluate, metrics, subject, table, watch
    from ldm_jax.runs import checkpoint

    measured = opened(args)
    names = tuple(args.metrics.split(","))
    asked = subject.Asked(names, on_command_line(args), None, plugins.contents(args.in_use), args.quiet)
    way = subject.way_of(measured, asked)
    check(args, way)
    subject.check(measured, asked)
    main = processes.start(args)

    def say(line: str) -> None:
        if main:
            print(line, file=sys.stderr)

    common = subject.tools(measured, asked)
    figures = table.choices(names, common["networks"])
    if args.keep_best and args.keep_best not in figures:
        there = ", ".join(figures) or "none"
        raise ValueError(f"--keep-best={args.keep_best} is no figure of this evaluation; there are {there}")
    settings = settings_from(measured.config, args) if way.draws else None
    asked = asked._replace(settings=settings, classifier=drawing.classifier(args))

    for step in steps_of(args, measured.config, measured.home, say):
        source = measured.home
        try:
            if args.keep_best:
                source = watch.hold(measured.home, measured.config, step)
            images, drawn_by = way.make(subject.request(measured, asked, step, source))
            case = metrics.Case(images, run=drawn_by, **common)
            origin = evaluate.origin(case, names)
            row = watch.earlier(measured.home, origin) if args.watch else None
            if row is None:
                row = evaluate.measure(case, names)
                if main:
                    print(json.dumps(row), flush=True)
                    subject.record(measured, row)
                for line in row.get("warnings", ()):
                    say(f"ldm evaluate: warning: {line}")
            if args.keep_best and watch.keep_if_best(source, row, origin, figures[args.keep_best]):
                say(f"step {step} is the best by {args.keep_best} so far: {measured.home / 'best'}")
        except Exception:
            # Training prunes old checkpoints, and this one may be among them, unless it is held.
            gone = args.watch and checkpoint.damage(checkpoint.folder(measured.home) / str(step))
            if not gone or source != measured.home:
                raise
            say(f"checkpoint {step} is left out: it vanished while it was evaluated")
        finally:
            if args.keep_best:
                watch.drop(measured.home)
    return 0
