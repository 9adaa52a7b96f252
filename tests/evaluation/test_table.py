"""The table of metrics: what a METRIC of one more file needs, brings and gives is all that the command line asks for."""

import argparse

import pytest

from ldm_jax.cli import evaluate as verb
from ldm_jax.evaluation import evaluate, subject, table
from ldm_jax.evaluation.metrics import Figure, Flag, Metric, option
from ldm_jax.training.tasks import TASKS
from tests.evaluation.fake import PIXELS, case, images


def _check(value):
    if value < 1:
        raise ValueError(f"--power={value}; expected at least 1")


POWER = Flag("power", "P", "power of the brightness (1)", int, 1.0, _check, open=float)


def brightness(case, batch, which):
    return {"brightness": (batch["image"].mean((1, 2, 3)) / 255) ** option(case, POWER)}


METRIC = Metric(
    names=("brightness", "light"),
    of="Of anything",
    help="how bright images are",
    figures=lambda case, network: {"brightness": float(case.seen.values["brightness"].mean())},
    gives=lambda network: (Figure("brightness", "share", higher=True),),
    each=brightness,
    flags=(POWER,),
    origin=lambda case: {"power": option(case, POWER)},
)


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr(table, "METRICS", table.METRICS | {name: METRIC for name in METRIC.names})
    monkeypatch.setattr(evaluate, "METRICS", table.METRICS)
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return parser


def test_a_metric_that_is_added_is_listed_read_checked_and_measured(parser, tmp_path):
    listing = table.listing()
    assert listing.endswith("Of anything:\n  brightness, light how bright images are (share, higher is better)")

    def asked(*words):
        args = parser.parse_args(["--workdir=x", *words])
        return subject.Asked((args.metrics,), verb.on_command_line(args))

    measured = subject.Subject(None, None, TASKS["autoencoder"].figures)
    for words, said in [
        (["--metrics=light", "--power=0"], "--power=0; expected at least 1"),
        (["--metrics=psnr", "--power=2"], "--power=2 goes with the metrics brightness and light; nothing reads it"),
        (["--metrics=light", "--subset=9"], "--subset=9 goes with metrics of some"),
    ]:
        with pytest.raises(ValueError, match=said):
            subject.check(measured, asked(*words))
    assert subject.reads(measured, asked("--metrics=light"))["power"][0]
    assert table.choices(["light"], []) == {"brightness": Figure("brightness", "share", True)}

    row = evaluate.measure(case(tmp_path, images(), options={"power": 2.0}), ["light"])
    assert row["brightness"] == pytest.approx(((PIXELS.mean((1, 2, 3)) / 255) ** 2).mean()) and row["power"] == 2.0


def test_names_figures_and_flags_are_each_of_one_metric():
    assert all(table.METRICS[name] is metric for metric in table.METRICS.values() for name in metric.names)
    figures = [
        figure.name
        for metric in dict.fromkeys(table.METRICS.values())
        for network in (metric.networks if metric.networks != ("any",) else ("inception", "clip")) or ("",)
        for figure in metric.gives(network)
    ]
    assert len(set(figures)) == len(figures) > 20
    flags = [flag for metric in table.METRICS.values() for flag in metric.flags]
    assert len({flag.name for flag in flags}) == len(set(flags)) == len(table.flags())
