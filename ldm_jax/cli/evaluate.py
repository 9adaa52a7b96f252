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
from typing import TYPE_CHECKING, NamedTuple

from ldm_jax.cli import checks, processes
from ldm_jax.cli.sample import add_sampling_arguments, settings_from

if TYPE_CHECKING:
    from ldm_jax.evaluation import ways
    from ldm_jax.training import first_stage, task
    from ldm_jax.training.experiment import Experiment

# Filled in after the flags of the command line are checked.
DEFAULTS = {"subset": 10_000, "seed": 0}


class Subject(NamedTuple):
    """What is measured: the config of a run, or of --data with the `published` autoencoder, and what its task offers."""

    config: "Experiment"
    figures: "task.Figures"
    published: "first_stage.FirstStage | None" = None


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


def feature_words(args: argparse.Namespace, figures: "task.Figures") -> list[str]:
    """NAME[:WHERE] of each feature network."""
    words = args.features or figures.features.format(workdir=args.workdir)
    return [word for word in words.split(",") if word]


def opened(args: argparse.Namespace) -> Subject:
    """What is in --workdir: a run, or a published autoencoder, of which --workdir becomes --out."""
    from ldm_jax.config import config_file, construct
    from ldm_jax.training import blocks, experiment, open_stage, published
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
        config = experiment.of_run(path)
        return Subject(config, blocks.kind_of(config).figures)
    for flag in ("step", "ema", "watch", "keep_best", "samples"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with a run; {args.workdir} is a published autoencoder")
    if not args.data or not args.out:
        raise ValueError(
            f"{args.workdir} is a published autoencoder: expected --data=CONFIG.py, whose reporting images it is shown, and "
            "--out=DIR, where figures and pictures go"
        )
    config = experiment.parse(config_file.load(args.data))
    measured = config.first_stage._replace(whitening="measured")
    config = config._replace(task=construct.Block(open_stage.TASK, {}), dtype="float32", first_stage=measured)
    args.workdir = args.out
    return Subject(config, blocks.kind_of(config).figures, open_stage.load(path, experiment=config))


def check(args: argparse.Namespace, figures: "task.Figures") -> None:
    """Raise ValueError for flags that are wrong, do not go together on such a run, or are read by nothing."""
    from ldm_jax.diffusion import seeds
    from ldm_jax.evaluation import evaluate, table, ways

    seeds.check("--seed", args.seed or 0)
    names, flags = args.metrics.split(","), on_command_line(args)
    for name in names:
        if name not in table.METRICS:
            raise ValueError(f"--metrics={name} is unknown; there are {', '.join(table.METRICS)}")
        if names.count(name) > 1:
            raise ValueError(f"--metrics={args.metrics} names {name} twice")
    checks.number("num", args.num, 2, checks.MOST_IMAGES)
    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
    checks.number("subset", args.subset, 4)
    if args.out:
        checks.folder("out", args.out)
    for flag in table.flags():
        if flag.name in flags:
            flag.check(flags[flag.name])
    if args.step and args.step != "all" and not args.step.isdecimal():
        raise ValueError(f"--step={args.step}; expected a number or 'all'")
    one = ""
    if not ways.way_of(args.samples, figures).several:
        one = "--samples" if args.samples else "a classifier's run, of which the newest checkpoint is measured"
    if args.step and (one or args.watch):
        raise ValueError(f"--step={args.step} does not go with {one or '--watch'}")
    if args.watch and one:
        raise ValueError(f"--watch does not go with {one}")
    if args.watch and args.distributed:
        raise ValueError("--watch does not go with --distributed: one process follows a training")
    if args.keep_best and not args.watch:
        raise ValueError(f"--keep-best={args.keep_best} goes with --watch")
    available = [word.partition(":")[0] for word in feature_words(args, figures)]
    evaluate.check_networks(names, available)
    for flag, (is_read, what) in reads(args, figures, available).items():
        if flag in flags and not is_read:
            raise ValueError(f"--{flag.replace('_', '-')}={flags[flag]} goes with {what}; nothing reads it here")


# What to say of a flag that a way to get images reads, where nothing reads it; drawn images for the others.
DRAWN = "images that are drawn from a diffusion run"
READ_BY = {
    "ema": "a checkpoint of a diffusion run or an autoencoder",
    "num": "images that are drawn, reconstructed or of a split",
    "out": "grids of an autoencoder's run",
}


def listed(names: Iterable[str]) -> str:
    """'the metric A', 'the metrics A, B and C'."""
    *first, last = names
    return f"the metrics {', '.join(first)} and {last}" if first else f"the metric {last}"


def reads(args: argparse.Namespace, figures: "task.Figures", available: list[str]) -> dict[str, tuple[bool, str]]:
    """{flag: (whether anything reads it, what does)}, of flags that not every evaluation reads."""
    from ldm_jax.evaluation import metrics, table, ways

    names = args.metrics.split(",")
    chosen, way = [table.METRICS[name] for name in names], ways.way_of(args.samples, figures)
    seen = any(metric.takes or metric.each for metric in chosen)
    by_way = {*way.reads, *(way.draws if seen else ())}
    used = {network for metric in chosen for network in metrics.networks_of(metric, available)}
    unused = [network for network in available if network not in used]
    result = {
        "features": (not unused, f"metrics of {', '.join(unused)}"),
        "reference": (any(metric.compares for metric in chosen), "metrics that compare with it, such as fid"),
        "subset": (
            any(how == "subset" for metric in chosen for how, _ in metric.takes),
            "metrics of some of the images' features, such as fid",
        ),
    }
    of_ways = [flag for each in ways.WAYS.values() for flag in (*each.reads, *each.draws)]
    of_metrics = [
        flag for metric in table.METRICS.values() for flag in (*metric.reads, *(f.name for f in metric.flags))
    ]
    for flag in dict.fromkeys([*of_ways, *of_metrics]):
        readers, what = table.readers(flag), []
        if flag in of_ways:
            what.append(READ_BY.get(flag, DRAWN))
        if readers:
            what.append(listed(readers))
        result[flag] = (flag in by_way or not set(names).isdisjoint(readers), ", or ".join(what))
    return result


def tools(args: argparse.Namespace, subject: Subject) -> dict[str, object]:
    """What every checkpoint is measured with: a metrics.Case but for its images."""
    from ldm_jax import plugins
    from ldm_jax.evaluation import features, metrics, table

    workdir, networks, options, flags = pathlib.Path(args.workdir), {}, {}, on_command_line(args)
    for word in feature_words(args, subject.figures):
        extractor = features.named(word)
        if extractor.name in networks:
            raise ValueError(f"--features={args.features} names {extractor.name} twice")
        networks[extractor.name] = extractor
    settings = metrics.Settings(
        reference=args.reference or f"split:{subject.config.split.report}",
        folder=workdir / "statistics",
        pictures=pathlib.Path(args.out or workdir / "pictures"),
        subset=args.subset,
        seed=args.seed,
        quiet=args.quiet,
        plugins=plugins.contents(args.in_use),
    )
    for metric in (table.METRICS[name] for name in args.metrics.split(",")):
        options |= {name: flags[name] for name in metric.reads if name in flags}
        for flag in metric.flags:
            if flag.name in flags and flag.name not in options:
                options[flag.name] = flag.open(flags[flag.name])
    return {"config": subject.config, "networks": networks, "settings": settings, "options": options}


def request(args: argparse.Namespace, subject: Subject, workdir: pathlib.Path, step: int | None) -> "ways.Request":
    """The images to measure; checkpoints are read in `workdir`."""
    from ldm_jax.evaluation import ways

    draws = ways.way_of(args.samples, subject.figures).draws
    return ways.Request(
        workdir,
        subject.config,
        num=args.num,
        step=step,
        ema=args.ema,
        samples=args.samples,
        published=subject.published,
        settings=settings_from(subject.config, args) if draws else None,
        seed=args.seed,
        prompts=args.prompts,
        labels=args.labels,
        first_stage=args.first_stage,
    )


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
    from ldm_jax.evaluation import evaluate, metrics, table, watch, ways
    from ldm_jax.runs import checkpoint, log

    subject = opened(args)
    workdir = pathlib.Path(args.workdir)
    check(args, subject.figures)
    main = processes.start(args)

    def say(line: str) -> None:
        if main:
            print(line, file=sys.stderr)

    for flag, value in {**DEFAULTS, "num": subject.figures.num}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    names, common = args.metrics.split(","), tools(args, subject)
    figures = table.choices(names, common["networks"])
    if args.keep_best and args.keep_best not in figures:
        there = ", ".join(figures) or "none"
        raise ValueError(f"--keep-best={args.keep_best} is no figure of this evaluation; there are {there}")
    way = ways.way_of(args.samples, subject.figures)

    for step in steps_of(args, subject.config, workdir, say):
        source = workdir
        try:
            if args.keep_best:
                source = watch.hold(workdir, subject.config, step)
            images, drawn_by = way.make(request(args, subject, source, step))
            case = metrics.Case(images, run=drawn_by, **common)
            origin = evaluate.origin(case, names)
            row = watch.earlier(workdir, origin) if args.watch else None
            if row is None:
                row = evaluate.measure(case, names)
                if main:
                    print(json.dumps(row), flush=True)
                    workdir.mkdir(parents=True, exist_ok=True)
                    log.append(workdir / "metrics.jsonl", row)
                for line in row.get("warnings", ()):
                    say(f"ldm evaluate: warning: {line}")
            if args.keep_best and watch.keep_if_best(source, row, origin, figures[args.keep_best]):
                say(f"step {step} is the best by {args.keep_best} so far: {workdir / 'best'}")
        except Exception:
            # Training prunes old checkpoints, and this one may be among them, unless it is held.
            if not args.watch or source != workdir or not checkpoint.damage(checkpoint.folder(workdir) / str(step)):
                raise
            say(f"checkpoint {step} is left out: it vanished while it was evaluated")
        finally:
            if args.keep_best:
                watch.drop(workdir)
    return 0
