"""The whole way on one page: train an autoencoder and a text-to-image latent DiT on shapes, sample, evaluate, report, check.

    make quickstart        (or: python -m experiments.quickstart [--smoke] [--workdir=DIR])

Every part is the command that a user would type; this file only strings them together, writes report.html, and fails when the
result is not what the README promises: on one-object prompts kind and colour both right in 60 % of 200 images, reconstructions of
24 dB. Stopped half way, it goes on where it was.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import sys
import time

import jax

from ldm_jax import cli, runs
from ldm_jax.data import SOURCES
from ldm_jax.evaluation import report
from ldm_jax.runs import log, provenance

ACCURACY, DECIBELS = 0.60, 24.0
PROMPTS = (
    "a large red circle",
    "a small blue square",
    "a large green triangle",
    "a small yellow cross",
    "a large purple circle",
    "a small cyan triangle",
    "a small red circle above a large blue square",
    "a large yellow triangle left of a small purple cross",
    "a large green square below a small red triangle",
    "a small blue cross right of a large cyan circle",
)


def program() -> str:
    """`ldm` as it is called from this folder: by name where the environment is activated, else by its path."""
    beside = pathlib.Path(sys.executable).absolute().with_name("ldm")
    if not beside.exists() or shutil.which("ldm") == str(beside):
        return "ldm"
    return os.path.relpath(beside) if beside.is_relative_to(pathlib.Path.cwd()) else str(beside)


def ldm(*words: str) -> None:
    """Run a command as a user would, in this process (so that jax starts once); leave with its exit code if it fails."""
    print(f"\n$ {program()} " + " ".join(f'"{w}"' if " " in w else w for w in words), flush=True)
    code = cli.main(list(words))
    if code:
        sys.exit(code)


def newest(path: pathlib.Path, key: str) -> dict:
    """The last line of a metrics file that holds `key`."""
    return [row for row in log.read_metrics(path) if key in row][-1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/quickstart", metavar="DIR", help="(runs/quickstart)")
    parser.add_argument("--smoke", action="store_true", help="every step at a tiny size; the check is skipped")
    args = parser.parse_args()
    begun = time.time()
    workdir = pathlib.Path(args.workdir)
    count = "16" if args.smoke else "200"
    config = "configs/quickstart.py" + (":smoke" if args.smoke else "")

    ldm("train", f"--config={config}", f"--workdir={workdir}")
    if not runs.read(workdir).is_finished:
        return 130  # stopped half way; training has said how to go on
    repeat = 1 if args.smoke else 4
    texts = [f"--text={text}" for text in PROMPTS for _ in range(repeat)]
    ldm(
        "sample",
        f"--workdir={workdir}",
        f"--num={len(texts)}",
        f"--out={workdir / 'samples'}",
        f"--columns={2 * repeat}",
        *texts,
    )
    one = SOURCES["shapes"](split="test", objects=(1, 1), size=int(count))
    prompts = workdir / "one_object_prompts.txt"
    prompts.write_text("".join(one[i]["text"] + "\n" for i in range(len(one))))
    ldm("evaluate", f"--workdir={workdir}", "--metrics=shapes", f"--num={count}", f"--prompts={prompts}")
    single = newest(workdir / "metrics.jsonl", "shapes_both")
    ldm("evaluate", f"--workdir={workdir}", "--metrics=shapes", f"--num={count}")
    scenes = newest(workdir / "metrics.jsonl", "shapes_both")
    ldm("evaluate", f"--workdir={workdir}", "--metrics=shapes", f"--num={count}", "--prompts=split:heldout")
    unseen = newest(workdir / "metrics.jsonl", "shapes_both")
    first = workdir / "first_stage"
    ldm("evaluate", f"--workdir={first}", "--metrics=psnr", f"--num={count}")
    decibels = newest(first / "metrics.jsonl", "psnr")["psnr"]

    minutes = (time.time() - begun) / 60
    table = [
        (
            "one object: kind and colour right",
            f"{single['shapes_both']:.1%}",
            f"must reach {ACCURACY:.0%}; N = {count}",
        ),
        ("one object: all attributes right", f"{single['shapes_all']:.1%}", "size and count too"),
        ("scenes of 1-2 objects: kind and colour right", f"{scenes['shapes_both']:.1%}", "every object of the scene"),
        ("scenes: relation right", _percent(scenes["shapes_relation"]), "above, below, left of, right of"),
        (
            "combinations never trained on: kind and colour",
            f"{unseen['shapes_both']:.1%}",
            "compositional generalisation",
        ),
        ("reconstructions", f"{decibels:.1f} dB", f"must reach {DECIBELS:.0f} dB"),
        ("time of this run", f"{minutes:.1f} min", "what was already there is not counted"),
    ]
    path = write_report(workdir, table)
    print(f"\n{'what':48} {'figure':>8}   note")
    for row in table:
        print(f"{row[0]:48} {row[1]:>8}   {row[2]}")
    print(f"\nreport: {path}")
    (workdir / "quickstart.json").write_text(
        json.dumps(
            {"one_object": single, "scenes": scenes, "heldout": unseen, "psnr": decibels, "minutes": minutes}, indent=1
        )
    )
    following = commands_for(workdir)
    print("\ngo on with, for example:", following[0][1], following[3][1], sep="\n  ")
    if program() != "ldm":
        print(
            f"(after `source {pathlib.Path(program()).with_name('activate')}` it is `ldm` alone; `ldm --help` lists the verbs)"
        )
    if args.smoke:
        return 0
    if single["shapes_both"] < ACCURACY or decibels < DECIBELS:
        print(f"FAILED: expected at least {ACCURACY:.0%} and {DECIBELS:.0f} dB", file=sys.stderr)
        return 1
    print(f"passed: at least {ACCURACY:.0%} and {DECIBELS:.0f} dB")
    return 0


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def commands_for(workdir: pathlib.Path) -> list[tuple[str, str]]:
    """(What it does, the command line) of what one may do next."""
    ldm = program()
    return [
        (
            "Draw what you like",
            f'{ldm} sample --workdir={workdir} --num=8 --out=out --text="a large red cross above a small blue circle"',
        ),
        (
            "Another sampler",
            f"{ldm} sample --workdir={workdir} --num=40 --out=out2 --sampler=dpmpp_2m --steps=10 --guidance=4",
        ),
        ("Measure again, more images", f"{ldm} evaluate --workdir={workdir} --metrics=shapes --num=1000"),
        (
            "Train longer, elsewhere",
            f"{ldm} train --config=configs/quickstart.py --workdir={workdir}_long --config.train.images=1000000",
        ),
        ("Watch the curves", f"{pathlib.Path(ldm).with_name('tensorboard')} --logdir={workdir}"),
        ("Real photographs", f"{ldm} train --config=configs/cifar10_ldm_dit.py --workdir=runs/cifar10_ldm_dit"),
    ]


def write_report(workdir: pathlib.Path, table: list[tuple[str, str, str]]) -> pathlib.Path:
    curves = []
    for title, folder in (("autoencoder", workdir / "first_stage"), ("latent DiT", workdir)):
        rows = [row for row in log.read_metrics(folder / "metrics.jsonl") if "loss" in row]
        curves.append((f"{title}: training loss", [r["images"] for r in rows], [r["loss"] for r in rows]))
    stage = workdir / "first_stage" / "pictures"
    grids = [
        ("Data", stage / "data.png", "images of the tuning split, as the autoencoder sees them"),
        (
            "Reconstructions",
            sorted(stage.glob("reconstructions_*.png"))[-1],
            "the same images, encoded to 8 x 8 x 6 and decoded",
        ),
        ("Samples by prompt", workdir / "samples" / "grid.png", "four of each prompt, guidance as in the config"),
    ]
    path = workdir / "report.html"
    report.write_report(
        path,
        title="ldm_jax quickstart",
        curves=curves,
        grids=grids,
        table=table,
        commands=commands_for(workdir),
        environment={
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind} ({jax.default_backend()})",
            "python": platform.python_version(),
            "jax": jax.__version__,
            "code": provenance.commit(),
        },
    )
    return path


if __name__ == "__main__":
    sys.exit(main())
