"""Generate images from a run's checkpoints and measure them: one JSON object a checkpoint, printed and appended to DIR/metrics.jsonl.

  ldm evaluate --workdir=runs/cifar10 --metrics=fid,accuracy --num=2000 --features=classifier:runs/classifier
  ldm evaluate --workdir=runs/quickstart --metrics=shapes --num=200
  ldm evaluate --workdir=runs/vae --metrics=psnr,fid --num=1000 --features=inception
  ldm evaluate --workdir=runs/cifar10 --metrics=fid --features=classifier:runs/classifier --samples=split:test

Metrics: fid (Frechet distance; called fd_classifier with a classifier's features, for only Inception's may be called FID),
accuracy (the classifier names the class asked for), shapes (the reader finds what the caption says), psnr (of reconstructions, in dB).
A classifier's own run is measured on the real images of its reporting split.
"""

import argparse
import json
import pathlib
import sys

from ldm_jax.cli.sample import add_sampling_arguments, settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run")
    parser.add_argument("--metrics", required=True, metavar="A,B,...", help="fid, accuracy, shapes, psnr")
    parser.add_argument("--num", type=int, default=1000, metavar="N", help="how many images (1000)")
    parser.add_argument("--step", default="", metavar="N|all", help="which checkpoint; default: the newest")
    parser.add_argument(
        "--features",
        default="",
        metavar="inception[:FILE|:download]|classifier:DIR",
        help="the network of fid and accuracy",
    )
    parser.add_argument(
        "--reference",
        default="",
        metavar="split:NAME|FILE.npz",
        help="what fid compares with; default: the reporting split",
    )
    parser.add_argument(
        "--samples", default="", metavar="FILE.npz|split:NAME", help="judge these images, generate none"
    )
    parser.add_argument(
        "--prompts", default="", metavar="FILE|split:NAME", help="captions to draw; default: the reporting split's"
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.evaluation import evaluate, features
    from ldm_jax.training import checkpoint, experiment, log
    from ldm_jax.weights import inception

    workdir = pathlib.Path(args.workdir)
    config = experiment.read_config(workdir)
    metrics = tuple(word for word in args.metrics.split(",") if word)
    for metric in metrics:
        if metric not in evaluate.METRICS:
            raise ValueError(f"--metrics={metric} is unknown; there are {', '.join(evaluate.METRICS)}")
    if args.num < 2:
        raise ValueError(f"--num={args.num}; expected at least 2")
    kind, _, where = args.features.partition(":")
    if config.task.name == "classifier" and not kind:
        kind, where = "classifier", args.workdir
    extractor = logits = None
    if kind == "inception":
        extractor = features.inception(inception.download() if where == "download" else where or None)
    elif kind == "classifier" and where:
        extractor, logits = evaluate.classifier(where)
    elif kind:
        raise ValueError(
            f"--features={args.features}; expected inception, inception:FILE, inception:download or classifier:DIR"
        )
    reference = args.reference or f"split:{config.split.report}"
    if args.step == "all":
        steps = []
        for step, wrong in checkpoint.intact(workdir):
            if wrong:
                print(f"checkpoint {step} is left out: {wrong}", file=sys.stderr)
            else:
                steps.insert(0, step)
    elif args.step and not args.step.isdigit():
        raise ValueError(f"--step={args.step}; expected a number or 'all'")
    else:
        steps = [int(args.step)] if args.step else [None]
    if args.step and (args.samples or config.task.name == "classifier"):
        what = "--samples" if args.samples else "a classifier's run, of which the newest checkpoint is measured"
        raise ValueError(f"--step={args.step} does not go with {what}")
    average = experiment.default_average(config) if args.ema is None else (None if args.ema == "none" else args.ema)

    for step in steps:
        if args.samples.startswith("split:"):
            images = evaluate.real(config, args.samples.removeprefix("split:"), args.num, "accuracy" in metrics)
        elif args.samples:
            images = evaluate.from_file(pathlib.Path(args.samples))
        elif config.task.name == "classifier":
            images = evaluate.real(config, config.split.report, judged=True)
        elif config.task.name == "autoencoder":
            images = evaluate.reconstructed(workdir, config, experiment.pick_step(workdir, step), average, args.num)
        else:
            model = experiment.restore(workdir, step, args.ema)
            settings = settings_from(config, args)
            images = evaluate.generated(
                model,
                settings,
                num=args.num,
                seed=args.seed,
                ema=average or "none",
                prompts=args.prompts,
                quiet=args.quiet,
            )
        row = evaluate.measure(
            images,
            metrics,
            config=config,
            extractor=extractor,
            logits=logits,
            reference=reference,
            cache=workdir / "statistics",
        )
        print(json.dumps(row), flush=True)
        log.append(workdir / "metrics.jsonl", row)
    return 0
