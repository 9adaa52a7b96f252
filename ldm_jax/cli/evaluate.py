"""Generate images from a run's checkpoints and measure them: one JSON object a checkpoint, printed and appended to DIR/metrics.jsonl.

  ldm evaluate --workdir=runs/cifar10 --metrics=fid,kid,prdc,accuracy --num=10000 --features=inception:W.pth,classifier:runs/classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid,sfid,is --num=50000 --labels=random --features=inception --reference=ADM.npz
  ldm evaluate --workdir=runs/text --metrics=clip,cmmd --num=10000 --features=clip:FOLDER --prompts=captions.txt
  ldm evaluate --workdir=runs/quickstart --metrics=shapes --num=200
  ldm evaluate --workdir=runs/vae --metrics=psnr,ssim,rfid,kl,latents --num=5000 --features=dinov2:FOLDER
  ldm evaluate --workdir=sd-vae-ft-mse --data=configs/imagenet256_vae.py --out=evaluation --metrics=psnr,rfid --features=inception
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --watch --keep-best=fd_classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --samples=split:test

Of generated images, by the networks of --features:
  fid, fd       Frechet distance, extrapolated to infinitely many images besides, with a 95 % interval. It is called fid with
                Inception's features alone, else fd_classifier, fd_dinov2, fd_clip
  fid_by_class  the same class by class, null for a class of which either side has fewer than two images
  sfid, is      of Inception's spatial features; inception score
  kid, prdc     kernel distance with its standard error; precision, recall, density and coverage
  cmmd, clip    maximum mean discrepancy of CLIP's embeddings; CLIP score of images and prompts
  accuracy      the classifier names the class asked for;  shapes: the reader finds what the caption says
  neighbours    shares of copied and of authentic images, and a grid of nearest training images
Of a diffusion run in pixels:  bits: bits a dimension of the reporting images.
Of an autoencoder's reconstructions (a grid of them beside their originals is always written):
  psnr, ssim, lpips, rfid (fid of reconstructions; rfd_... with other features), codebook (usage and perplexity), kl (bits a latent
  dimension), latents (mean and variance by channel, spectrum)

Images are made once for all metrics. Reference features are measured once and kept in DIR/statistics. A classifier's own run is
measured on the real images of its reporting split. A published autoencoder (a folder of diffusers', a file, hub:OWNER/NAME) is measured
on the reporting split of the config in --data, and all that is written goes to --out. A flag that nothing reads is refused.
"""

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from ldm_jax.cli import checks, processes
from ldm_jax.cli.sample import add_sampling_arguments, settings_from

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ldm_jax.evaluation import images
    from ldm_jax.training import experiment

# Filled in after the flags that were given are checked.
DEFAULTS = {"num": 1000, "subset": 10_000, "draws": 100, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--lpips", default="", metavar="VGG16.pth,HEADS.pth", help="the published files of lpips")
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
    parser.add_argument("--draws", type=int, metavar="N", help="resamples of the 95 %% interval; 0: none (100)")
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


def feature_words(args: argparse.Namespace, config: "ConfigDict") -> list[str]:
    """NAME[:WHERE] of each feature network; those of a classifier's run are its own by default."""
    own = f"classifier:{args.workdir}" if config.task.name == "classifier" else ""
    return [word for word in (args.features or own).split(",") if word]


def opened(args: argparse.Namespace) -> "tuple[ConfigDict, experiment.stages.FirstStage | None]":
    """The config of what is in --workdir, and None; or of --data, and the published autoencoder, --workdir then being --out."""
    from ldm_jax.config import config_file
    from ldm_jax.training import experiment, published

    path = pathlib.Path(args.workdir)
    if args.data or not path.is_dir():
        path = published.place(args.workdir)
    if not published.is_published(path):
        if args.data:
            raise ValueError(f"--data={args.data} goes with a published autoencoder; a run has data of its own")
        return experiment.read_config(path), None
    for flag in ("step", "ema", "watch", "keep_best", "samples"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with a run; {args.workdir} is a published autoencoder")
    if not args.data or not args.out:
        raise ValueError(
            f"{args.workdir} is a published autoencoder: expected --data=CONFIG.py, whose reporting images it is shown, and "
            "--out=DIR, where figures and pictures go"
        )
    config = config_file.load(args.data).copy_and_resolve_references()
    with config.unlocked():
        config.task, config.precision, config.first_stage.whitening = {"name": "autoencoder"}, "float32", "measured"
    args.workdir = args.out
    return config.lock(), experiment.load_first_stage(path, config=config)


def check(args: argparse.Namespace, config: "ConfigDict") -> None:
    """Raise ValueError for flags that are wrong, do not go together on such a run, or are read by nothing."""
    from ldm_jax.diffusion import seeds
    from ldm_jax.evaluation import evaluate, metrics

    seeds.check("--seed", args.seed or 0)
    given = {flag: value for flag, value in vars(args).items() if value not in (None, "")}
    names = args.metrics.split(",")
    for name in names:
        if name not in metrics.METRICS:
            raise ValueError(f"--metrics={name} is unknown; there are {', '.join(metrics.METRICS)}")
    checks.number("num", args.num, 2, checks.MOST_IMAGES)
    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
    if args.out:
        checks.folder("out", args.out)
    for flag, least in (("subset", 4), ("draws", 40)):
        if given.get(flag, least) < least and not (flag == "draws" and args.draws == 0):
            raise ValueError(
                f"--{flag}={given[flag]}; expected at least {least}" + (" (or 0)" if flag == "draws" else "")
            )
    if args.step and args.step != "all" and not args.step.isdecimal():
        raise ValueError(f"--step={args.step}; expected a number or 'all'")
    one = "--samples" if args.samples else ""
    if config.task.name == "classifier":
        one = one or "a classifier's run, of which the newest checkpoint is measured"
    if args.step and (one or args.watch):
        raise ValueError(f"--step={args.step} does not go with {one or '--watch'}")
    if args.watch and one:
        raise ValueError(f"--watch does not go with {one}")
    if args.watch and args.distributed:
        raise ValueError("--watch does not go with --distributed: one process follows a training")
    if args.keep_best and not args.watch:
        raise ValueError(f"--keep-best={args.keep_best} goes with --watch")
    at_hand = [word.partition(":")[0] for word in feature_words(args, config)]
    evaluate.check_networks(names, at_hand)
    for flag, (is_read, what) in reads(args, config, at_hand).items():
        if flag in given and not is_read:
            raise ValueError(f"--{flag.replace('_', '-')}={given[flag]} goes with {what}; nothing reads it here")
    if args.lpips and len([file for file in args.lpips.split(",") if file]) != 2:
        raise ValueError(f"--lpips={args.lpips}; expected two files, VGG16.pth,HEADS.pth")


def reads(args: argparse.Namespace, config: "ConfigDict", at_hand: list[str]) -> dict[str, tuple[bool, str]]:
    """{flag: (whether anything reads it, what does)} of a run of this task, of flags that not every evaluation reads."""
    from ldm_jax.evaluation import metrics

    names = args.metrics.split(",")
    asked = [metrics.METRICS[name] for name in names]
    takes = {take for metric in asked for take in metric.takes}
    used = {network for metric in asked for network in metrics.networks_of(metric, at_hand)}
    unused = [network for network in at_hand if network not in used]
    task = "" if args.samples else config.task.name
    first_stage = task in ("autoencoder", "tiny_autoencoder")
    draws = task == "diffusion" and any(metric.takes or metric.each for metric in asked)
    file = args.samples and not args.samples.startswith("split:")
    drawn, resampled = "images that are drawn from a diffusion run", ("moments", "features") in takes
    sampling = ("sampler", "grid", "guidance", "guidance_method", "guidance_schedule", "threshold", "first_stage")
    return {
        **dict.fromkeys((*sampling, "prompts", "labels"), (draws, drawn)),
        "steps": (draws or "bits" in names, f"{drawn}, or the metric bits"),
        "seed": (draws or "bits" in names or resampled, f"{drawn}, or the metrics bits, fid, fd and rfid"),
        "ema": (task == "diffusion" or first_stage, "a checkpoint of a diffusion run or an autoencoder"),
        "num": (not file, "images that are drawn, reconstructed or of a split"),
        "features": (not unused, f"metrics of {', '.join(unused)}"),
        "lpips": ("lpips" in names, "the metric lpips"),
        "reference": (any(metric.compares for metric in asked), "metrics that compare with it, such as fid"),
        "subset": (any(how == "subset" for how, _ in takes), "metrics of some of the images' features, such as fid"),
        "draws": (resampled, "the metrics fid, fd and rfid"),
        "out": (first_stage or "neighbours" in names, "grids: of the metric neighbours, or of an autoencoder's run"),
    }


def tools(args: argparse.Namespace, config: "ConfigDict") -> dict[str, Any]:
    """What every checkpoint is measured with: a metrics.Case but for its images."""
    from ldm_jax.evaluation import features, metrics

    workdir, words, networks = pathlib.Path(args.workdir), feature_words(args, config), {}
    for word in words:
        extractor = features.named(word)
        if extractor.name in networks:
            raise ValueError(f"--features={args.features} names {extractor.name} twice")
        networks[extractor.name] = extractor
    settings = metrics.Settings(
        reference=args.reference or f"split:{config.split.report}",
        folder=workdir / "statistics",
        pictures=pathlib.Path(args.out or workdir / "pictures"),
        subset=args.subset,
        draws=args.draws,
        seed=args.seed,
        steps=args.steps or config.sampler.steps,
        quiet=args.quiet,
    )
    return {
        "config": config,
        "networks": networks,
        "settings": settings,
        "clip_folder": next((word.partition(":")[2] for word in words if word.startswith("clip:")), ""),
        "lpips": metrics.lpips(*args.lpips.split(",")) if args.lpips else None,
    }


def to_judge(
    args: argparse.Namespace,
    config: "ConfigDict",
    workdir: pathlib.Path,
    step: int | None,
    stage: "experiment.stages.FirstStage | None" = None,
) -> "tuple[images.Images, experiment.Restored | None]":
    """The images, none of them made yet, and the diffusion model that will draw them; checkpoints are read in `workdir`."""
    from ldm_jax.evaluation import images
    from ldm_jax.runs import checkpoint
    from ldm_jax.training import experiment

    average = experiment.default_average(config) if args.ema is None else (None if args.ema == "none" else args.ema)
    if args.samples.startswith("split:"):
        return images.real(config, args.samples.removeprefix("split:"), args.num), None
    if args.samples:
        return images.from_file(pathlib.Path(args.samples)), None
    if stage is not None:
        return images.reconstructed_by(stage, config, args.num), None
    if config.task.name == "classifier":
        return images.real(config, config.split.report, args.num), None
    if config.task.name in ("autoencoder", "tiny_autoencoder"):
        return images.reconstructed(workdir, config, checkpoint.pick(workdir, step), average, args.num), None
    run, settings = experiment.restore(workdir, step, args.ema, args.first_stage), settings_from(config, args)
    asked = {"num": args.num, "seed": args.seed, "prompts": args.prompts, "labels": args.labels}
    drawn = images.generated(run, settings, ema=average or "none", **asked)
    if args.first_stage:
        own = run.model.stage.decoder
        drawn.made_by["first_stage"] = own or checkpoint.identity(args.first_stage, checkpoint.newest(args.first_stage))
    return drawn, run


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.evaluation import evaluate, metrics, watch
    from ldm_jax.runs import checkpoint, log

    config, stage = opened(args)
    workdir = pathlib.Path(args.workdir)
    check(args, config)
    main = processes.start(args)

    def say(line: str) -> None:
        if main:
            print(line, file=sys.stderr)

    for flag, value in DEFAULTS.items():
        if getattr(args, flag) is None and (flag, config.task.name) != ("num", "classifier"):
            setattr(args, flag, value)
    names, common = args.metrics.split(","), tools(args, config)
    figures = metrics.choices(names, common["networks"])
    if args.keep_best and args.keep_best not in figures:
        there = ", ".join(figures) or "none"
        raise ValueError(f"--keep-best={args.keep_best} is no figure of this evaluation; there are {there}")
    if args.watch:
        steps = watch.new_steps(workdir, config, say)
    elif args.step == "all":
        found = sorted(checkpoint.intact(workdir))
        for step, wrong in found:
            if wrong:
                say(f"checkpoint {step} is left out: {wrong}")
        steps = [step for step, wrong in found if not wrong]
    else:
        steps = [int(args.step) if args.step else None]

    for step in steps:
        source = workdir
        try:
            if args.keep_best:
                source = watch.hold(workdir, config, step)
            judged, drawn_by = to_judge(args, config, source, step, stage)
            case = metrics.Case(judged, run=drawn_by, **common)
            origin = evaluate.origin(case, names)
            row = watch.known(workdir, origin) if args.watch else None
            if row is None:
                row = evaluate.measure(case, names)
                if main:
                    print(json.dumps(row), flush=True)
                    workdir.mkdir(parents=True, exist_ok=True)
                    log.append(workdir / "metrics.jsonl", row)
                for line in row.get("warnings", ()):
                    say(f"ldm evaluate: warning: {line}")
            if args.keep_best and watch.keep_if_best(source, row, origin, args.keep_best):
                say(f"step {step} is the best by {args.keep_best} so far: {workdir / 'best'}")
        except Exception:
            # Training prunes old checkpoints, of which one may be this one, unless it is held.
            if not args.watch or source != workdir or not checkpoint.damage(checkpoint.folder(workdir) / str(step)):
                raise
            say(f"checkpoint {step} is left out: it vanished while it was evaluated")
        finally:
            if args.keep_best:
                watch.drop(workdir)
    return 0
