"""Generate images from a run's checkpoints and measure them: one JSON object a checkpoint, printed and appended to DIR/metrics.jsonl.

  ldm evaluate --workdir=runs/cifar10 --metrics=fid,kid,prdc,accuracy --num=10000 --features=inception:W.pth,classifier:runs/classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid,sfid,is --num=50000 --labels=random --features=inception --reference=ADM.npz
  ldm evaluate --workdir=runs/text --metrics=clip,cmmd --num=10000 --features=clip:FOLDER --prompts=captions.txt
  ldm evaluate --workdir=runs/quickstart --metrics=shapes --num=200
  ldm evaluate --workdir=runs/vae --metrics=psnr,ssim,rfid,kl,latents --num=5000 --features=dinov2:FOLDER
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --watch --keep-best=fd_classifier
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --samples=split:test

Of generated images, by the networks of --features:
  fid, fd       Frechet distance, extrapolated to infinitely many images besides, with a 95 % interval. It is called fid with
                Inception's features alone, else fd_classifier, fd_dinov2, fd_clip
  fid_by_class  the same class by class;  sfid: of Inception's spatial features;  is: inception score
  kid, prdc     kernel distance with its standard error; precision, recall, density and coverage
  cmmd, clip    maximum mean discrepancy of CLIP's embeddings; CLIP score of images and prompts
  accuracy      the classifier names the class asked for;  shapes: the reader finds what the caption says
  neighbours    shares of copied and of authentic images, and a grid of nearest training images
Of a diffusion run in pixels:  bits: bits a dimension of the reporting images.
Of an autoencoder's reconstructions (a grid of them beside their originals is always written):
  psnr, ssim, lpips, rfid (fid of reconstructions; rfd_... with other features), codebook (usage and perplexity), kl (bits a latent
  dimension), latents (mean and variance by channel, spectrum)

Images are made once for all metrics. Reference features are measured once and kept in DIR/statistics. A classifier's own run is
measured on the real images of its reporting split.
"""

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from ldm_jax.cli.sample import add_sampling_arguments, settings_from

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ldm_jax.evaluation import images
    from ldm_jax.training import experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run")
    parser.add_argument("--metrics", required=True, metavar="A,B,...", help="what to measure, as listed above")
    parser.add_argument("--num", type=int, default=1000, metavar="N", help="how many images (1000)")
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
    parser.add_argument(
        "--subset", type=int, default=10_000, metavar="N", help="images whose features are kept, at most (10000)"
    )
    parser.add_argument(
        "--draws", type=int, default=100, metavar="N", help="resamples of the 95 %% interval; 0: none (100)"
    )
    parser.add_argument("--out", default="", metavar="DIR", help="where grids go; default: DIR/pictures of the run")
    parser.add_argument("--watch", action="store_true", help="follow a training: each new checkpoint once, to its end")
    parser.add_argument(
        "--keep-best",
        default="",
        metavar="FIGURE",
        help="with --watch: copy the checkpoint that is best by it to DIR/best",
    )
    add_sampling_arguments(parser)


def check(args: argparse.Namespace, config: "ConfigDict") -> None:
    """Raise ValueError for flags that are wrong, or do not go together on such a run."""
    from ldm_jax.evaluation import metrics

    for name in args.metrics.split(","):
        if name not in metrics.METRICS:
            raise ValueError(f"--metrics={name} is unknown; there are {', '.join(metrics.METRICS)}")
    for flag, value, least in (("num", args.num, 2), ("subset", args.subset, 4), ("draws", args.draws or 40, 40)):
        if value < least:
            raise ValueError(f"--{flag}={value}; expected at least {least}" + (" (or 0)" if flag == "draws" else ""))
    if args.step and args.step != "all" and not args.step.isdigit():
        raise ValueError(f"--step={args.step}; expected a number or 'all'")
    one = "--samples" if args.samples else ""
    if config.task.name == "classifier":
        one = one or "a classifier's run, of which the newest checkpoint is measured"
    if args.step and (one or args.watch):
        raise ValueError(f"--step={args.step} does not go with {one or '--watch'}")
    if args.watch and one:
        raise ValueError(f"--watch does not go with {one}")
    if args.keep_best and not args.watch:
        raise ValueError(f"--keep-best={args.keep_best} goes with --watch")
    if args.labels and (one or config.task.name != "diffusion"):
        raise ValueError(f"--labels={args.labels} goes with images that are drawn from a diffusion run")
    if args.lpips and len([file for file in args.lpips.split(",") if file]) != 2:
        raise ValueError(f"--lpips={args.lpips}; expected two files, VGG16.pth,HEADS.pth")


def tools(args: argparse.Namespace, config: "ConfigDict") -> dict[str, Any]:
    """What every checkpoint is measured with: a metrics.Case but for its images."""
    from ldm_jax.evaluation import features, metrics

    workdir = pathlib.Path(args.workdir)
    own = f"classifier:{workdir}" if config.task.name == "classifier" else ""
    words = [word for word in (args.features or own).split(",") if word]
    networks = {}
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
    args: argparse.Namespace, config: "ConfigDict", step: int | None
) -> "tuple[images.Images, experiment.Restored | None]":
    """The images, none of them made yet, and the diffusion model that will draw them."""
    from ldm_jax.evaluation import images
    from ldm_jax.training import checkpoint, experiment

    workdir = pathlib.Path(args.workdir)
    average = experiment.default_average(config) if args.ema is None else (None if args.ema == "none" else args.ema)
    if args.samples.startswith("split:"):
        return images.real(config, args.samples.removeprefix("split:"), args.num), None
    if args.samples:
        return images.from_file(pathlib.Path(args.samples)), None
    if config.task.name == "classifier":
        return images.real(config, config.split.report), None
    if config.task.name in ("autoencoder", "distill"):
        return images.reconstructed(workdir, config, experiment.pick_step(workdir, step), average, args.num), None
    run, settings = experiment.restore(workdir, step, args.ema, args.first_stage), settings_from(config, args)
    asked = {"num": args.num, "seed": args.seed, "prompts": args.prompts, "labels": args.labels}
    drawn = images.generated(run, settings, ema=average or "none", **asked)
    if args.first_stage:
        drawn.made_by["first_stage"] = checkpoint.identity(args.first_stage, checkpoint.newest(args.first_stage))
    return drawn, run


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.evaluation import evaluate, metrics, watch
    from ldm_jax.training import checkpoint, experiment, log

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    workdir = pathlib.Path(args.workdir)
    config = experiment.read_config(workdir)
    check(args, config)
    names, common = args.metrics.split(","), tools(args, config)
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
        try:
            judged, drawn_by = to_judge(args, config, step)
            case = metrics.Case(judged, run=drawn_by, **common)
            origin = evaluate.origin(case, names)
            row = watch.known(workdir, origin) if args.watch else None
            if row is None:
                row = evaluate.measure(case, names)
                print(json.dumps(row), flush=True)
                for line in row.get("warnings", ()):
                    say(f"warning: {line}")
                log.append(workdir / "metrics.jsonl", row)
            if args.keep_best and watch.keep_if_best(workdir, config, row, origin, args.keep_best):
                say(f"step {step} is the best by {args.keep_best} so far: {workdir / 'best'}")
        except Exception:
            # Training prunes old checkpoints, of which one may be this one.
            if not args.watch or step in watch.whole(workdir):
                raise
            say(f"checkpoint {step} is left out: it vanished while it was evaluated")
    return 0
