"""How far ldm_jax is from the published torch classes, pipelines and schedulers: every figure measured anew.

    python -m experiments.published [--only NAME]        NAME: a class of ldm_jax.weights.FORMATS, 'pipelines' or 'schedulers'

torch, diffusers and transformers (requirements-test.txt) are here as oracles, in the tiny configurations of tests/oracle with
random weights everywhere. Networks: torch's folder is loaded, outputs and a gradient are compared, torch loads what weights.save
writes. Pipelines and schedulers: the tests themselves are run, and what their comparisons met is written down. Writes README.md
and results.json to published/; with --only the other figures stay as they were there.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Else torch's threads spin while XLA's compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As in tests/conftest.py: compiling is nearly all of the time here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ldm_jax import pipelines, weights
from tests.oracle import (
    test_autoencoder_kl,
    test_autoencoder_tiny,
    test_clip,
    test_dinov2,
    test_dit,
    test_unet,
    test_vq,
)
from tests.oracle.test_dit import nchw
from tests.pipelines.published import stir

# torch's model, what it computes (images NCHW), and what ours computes from the same inputs (NHWC).
Case = tuple[torch.nn.Module, Callable[[torch.nn.Module], Any], Callable[[Any, Any], Any]]

FOLDER = pathlib.Path(__file__).with_suffix("")
AUTOENCODERS = {"AutoencoderKL": test_autoencoder_kl, "VQModel": test_vq, "AutoencoderTiny": test_autoencoder_tiny}
# Tests in tests/oracle/test_pipelines.py that compare ours with ours.
WITHOUT_TWIN = "not (round_trip or themselves or one_program or offloaded or single_file)"
PAGE = """# Equality with the published torch code

`python -m experiments.published` makes this page and [results.json](results.json): each configuration and comparison.
{versions}; {machine}; float32, seed 0.
Tiny configurations, random weights everywhere; `tests/oracle` holds the same comparisons to tolerances: outputs 1e-4, gradients 1e-3
relative, pipelines 2e-3, schedulers 1e-4 relative.

## Networks

- *options covered*: those that take several values in these configurations.
- *max difference*: of all outputs, max |ours - torch's|, with weights that ldm_jax read from the folder which torch saved.
- *gradient*: of L = sum over the outputs of <w, y>, w standard normal, by the parameters: max |ours - torch's| in a tensor over
  the largest in it (or over a thousandth of the largest in the network, where that is more: the bias of all keys changes no attention).
- *saved and loaded back*: torch's folder read by ldm_jax, written by it and read by torch: names, dtypes and all bits.

{networks}
## Pipelines

The same folder and noise on both sides, 2 to 10 steps; latents of unit variance, pictures in [0, 1].

{pipelines}
## Schedulers

The last state of diffusers' own loop against ours, for a Gaussian's exact model at the number that the scheduler feeds; over max |x|.

{schedulers}"""
# Of transformers' outputs and of ours.
CLIP_OUTPUTS = {"pooler_output": "pooled"} | {
    name: name for name in ("hidden_states", "last_hidden_state", "text_embeds", "image_embeds", "logits_per_image")
}


def denoiser(model: torch.nn.Module, x: np.ndarray, t: np.ndarray, cond: dict, words: dict) -> Case:
    """ours is given `cond`, torch's `words`."""

    def theirs(m):
        return m(nchw(x), timestep=torch.tensor(t), **words).sample

    return model, theirs, lambda m, params: m.apply({"params": params}, x, t, cond)


def unet(name: str) -> Case:
    x, t, cond, words = test_unet.inputs(name)
    return denoiser(test_unet.build(name)[0], x, t, cond, words)


def dit(name: str) -> Case:
    model, module, _ = test_dit.make_dit(name)
    x, t, label, _, _ = test_dit.inputs(module, (model.config.sample_size,) * 2)
    return denoiser(model, x, t, {"label": label}, {"class_labels": torch.tensor(label).long()})


def pixart(name: str, size: tuple[int, int]) -> Case:
    model, module, _ = test_dit.make_pixart(name)
    x, t, _, text, mask = test_dit.inputs(module, size)
    words = {"encoder_hidden_states": torch.tensor(text), "encoder_attention_mask": torch.tensor(mask).float()}
    return denoiser(model, x, t, {"text": text, "text_mask": mask}, words)


def autoencoder(tests: ModuleType, name: str) -> Case:
    """Latents, their log variance where there is one, and the decoded picture."""
    torch.manual_seed(0)
    if tests is test_autoencoder_tiny:
        model = stir(diffusers.AutoencoderTiny(**tests.CONFIGS[name]))
    else:
        model = tests.pair(name if tests is test_vq else tests.CONFIGS[name])[0].eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, model.config.in_channels)).astype(np.float32)

    def through(z, decode):
        mean, logvar = (z.mean, z.logvar) if hasattr(z, "logvar") else (z, None)
        return decode(mean), mean, logvar

    def ours(m, params):
        apply = functools.partial(m.apply, {"params": params})
        return through(apply(x, method="encode"), functools.partial(apply, method="decode"))

    return model, lambda m: through(m.encode(nchw(x))[0], lambda z: m.decode(z).sample), ours


def clip(kind: str, text: str, vision: str) -> Case:
    model, _, module, _ = test_clip.build(kind, test_clip.TEXTS[text], test_clip.VISIONS[vision])
    inputs, words = {}, {"output_hidden_states": kind != "CLIPModel"}
    if "Vision" not in kind:
        inputs |= {"tokens": test_clip.tokens_for(getattr(module, "text", module)), "mask": test_clip.MASK}
        words |= {"input_ids": torch.tensor(inputs["tokens"]), "attention_mask": torch.tensor(inputs["mask"])}
    if "Text" not in kind:
        inputs["pixel_values"] = test_clip.pixels_for(getattr(module, "vision", module))
        words["pixel_values"] = nchw(inputs["pixel_values"])
    names = [name for name in CLIP_OUTPUTS if getattr(model(**words), name, None) is not None]

    def of(out, names):
        return [getattr(out, name) for name in names]

    def ours(m, params):
        return of(m.apply({"params": params}, **inputs), [CLIP_OUTPUTS[name] for name in names])

    return model, lambda m: of(m(**words), names), ours


def dinov2(name: str) -> Case:
    """At a size that the positions were not learned for."""
    model = test_dinov2.build(name)
    height, width = (int(model.config.image_size * k) for k in (1.6, 0.7))
    x = np.random.default_rng(0).normal(size=(2, height, width, model.config.num_channels)).astype(np.float32)

    def theirs(m):
        out = m(nchw(x), output_hidden_states=True)
        return [*out.hidden_states, out.last_hidden_state, out.pooler_output]

    def ours(m, params):
        out = m.apply({"params": params}, x)
        return [*out.hidden_states, out.last_hidden_state, out.pooled]

    return model, theirs, ours


def cases() -> dict[str, dict[str, Callable[[], Case]]]:
    """class -> configuration -> what builds it."""
    cases_of_class, part = {}, functools.partial
    for kind, tests in AUTOENCODERS.items():
        cases_of_class[kind] = {name: part(autoencoder, tests, name) for name in tests.CONFIGS}
    cases_of_class["DiTTransformer2DModel"] = {name: part(dit, name) for name in test_dit.DIT}
    sizes = itertools.product(test_dit.PIXART, ((8, 8), (4, 12)))
    cases_of_class["PixArtTransformer2DModel"] = {
        f"{name}, {h} x {w}": part(pixart, name, (h, w)) for name, (h, w) in sizes
    }
    for name, (kind, *_) in test_unet.CONFIGS.items():
        cases_of_class.setdefault(kind.__name__, {})[name] = part(unet, name)
    for kind in test_clip.FORMATS:
        pairs = zip(test_clip.TEXTS, test_clip.VISIONS)
        cases_of_class[kind] = {f"{text}; {vision}": part(clip, kind, text, vision) for text, vision in pairs}
    for name, (kind, _) in test_dinov2.CONFIGS.items():
        cases_of_class.setdefault(kind.__name__, {})[name] = part(dinov2, name)
    return cases_of_class


def twin(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model like `model` with the tensors `state`: where blocks share one in training (DiT's embedder), each has a copy."""
    anew = getattr(type(model), "from_config", type(model))(model.config)
    anew.load_state_dict(state)
    return anew


def measure(kind: str, configuration: str, case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Forward, gradient and files of one configuration; `folder` is empty."""
    model, theirs, ours = case
    saved = twin(model, model.state_dict())
    saved.save_pretrained(folder / "theirs")
    module, params = weights.load(folder / "theirs")
    weights.save(folder / "ours", module, params)
    state, again = saved.state_dict(), type(saved).from_pretrained(folder / "ours").state_dict()
    expected, random = jax.tree.leaves(theirs(model)), np.random.default_rng(1)
    expected = [y.permute(0, 2, 3, 1) if y.ndim == 4 else y for y in expected]
    w = [random.standard_normal(y.shape).astype(np.float32) for y in expected]
    sum((y * torch.tensor(w_k)).sum() for y, w_k in zip(expected, w)).backward()
    # Frequencies and the like have no gradient.
    slopes = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    # By way of files, whose names are not always those in memory.
    twin(model, model.state_dict() | slopes).save_pretrained(folder / "slopes")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        y = jax.tree.leaves(ours(module, params))
        assert [y_k.shape for y_k in y] == [w_k.shape for w_k in w], (kind, configuration)
        return sum(jnp.vdot(w_k, y_k) for w_k, y_k in zip(w, y)), y

    got, y = run(params)
    expected, slopes = [y.detach().numpy() for y in expected], jax.tree.leaves(weights.load(folder / "slopes")[1])
    floor = 1e-3 * max(np.abs(e).max() for e in slopes)
    steps = zip(jax.tree.leaves(got), slopes, strict=True)
    # np.max: Python's passes over NaN.
    return {
        "class": kind,
        "configuration": configuration,
        "options": weights.FORMATS[kind].config(module),
        "tensors": len(state),
        "max abs output": float(np.max([np.abs(b).max() for b in expected])),
        "difference": float(np.max([np.abs(a - b).max() for a, b in zip(y, expected)])),
        "gradient": float(np.max([np.abs(g - e).max() / max(np.abs(e).max(), floor) for g, e in steps])),
        "bit-equal": state.keys() == again.keys()
        and all(v.dtype == again[k].dtype and torch.equal(v, again[k]) for k, v in state.items()),
    }


class Recorder:
    """A pytest plugin that keeps what each numpy.testing.assert_allclose met, and what it was about.

    That is the pipeline whose folder was read last, with its scheduler, or the scheduler that the test's `make` made last.
    """

    def __init__(self):
        self.met, self.failed, self.subject = [], set(), ""

    def pytest_runtest_logreport(self, report):
        self.failed |= {report.nodeid.split("::")[-1]} if report.failed else set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        exact, load, make = np.testing.assert_allclose, pipelines.load, getattr(item.module, "make", None)

        def compare(actual, desired, *args, **options):
            a, b = np.asarray(actual), np.asarray(desired)
            what = "pictures" if b.shape[-1:] == (3,) else "latents"
            row = {"subject": self.subject, "test": item.originalname, "case": item.name, "what": what}
            self.met.append(row | {"max abs": float(np.abs(b).max()), "difference": float(np.abs(a - b).max())})
            return exact(actual, desired, *args, **options)

        def load_and_tell(folder, *args, **options):
            index = json.loads((pathlib.Path(folder) / "model_index.json").read_text())
            self.subject = f"{index['_class_name']}, {index['scheduler'][1]}"
            return load(folder, *args, **options)

        def make_and_tell(name, *args, **options):
            self.subject = name
            return make(name, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.testing, "assert_allclose", compare)
            patch.setattr(pipelines, "load", load_and_tell)
            patch.setattr(item.module, "make", make_and_tell, raising=False)
            return (yield)


def run_tests(file: str, chosen: str = "") -> list[dict[str, Any]]:
    """What the comparisons of a file in tests/oracle met, those of failing tests included, and marked.

    RuntimeError naming tests that failed before they compared anything: no row would show them.
    """
    recorder, path = Recorder(), pathlib.Path(__file__).parent.parent / "tests" / "oracle" / file
    pytest.main(["-q", "-p", "no:cacheprovider", str(path), "-k", chosen], plugins=[recorder])
    if silent := recorder.failed - {row["case"] for row in recorder.met}:
        raise RuntimeError(f"{file}: {', '.join(sorted(silent))} failed, expected comparisons")
    return [row | {"passed": row["case"] not in recorder.failed} for row in recorder.met]


def covered(rows: Sequence[dict]) -> str:
    """Options that take more than one value in these configurations, with the values; a list of names counts as its names."""
    options: dict[str, dict[str, None]] = {}
    for row in rows:
        for option, value in row["options"].items():
            for name, v in value.items() if isinstance(value, dict) else {"": value}.items():
                words = v if isinstance(v, (tuple, list)) and all(isinstance(word, str) for word in v) else [str(v)]
                options.setdefault(f"{option}.{name}".rstrip("."), {}).update(dict.fromkeys(words))
    return "; ".join(f"`{option}` {', '.join(v)}" for option, v in options.items() if len(v) > 1)


def worst(rows: Iterable[dict], name: str = "difference", **where: str) -> float | str:
    return max((r[name] for r in rows if where.items() <= r.items()), default="-")


def compared(rows: list[dict]) -> str:
    failed = sorted({row["case"] for row in rows if not row["passed"]})
    return f"{len(rows)}" + f", **fails: {', '.join(failed)}**" * bool(failed)


def table(by: str, rows: Iterable[dict], columns: dict[str, Callable[[list[dict]], Any]], key: str = "subject") -> str:
    """Markdown: a line for the rows of each value of `key`, of which a column is a function; `by` is the head of the keys."""
    groups, width = {}, 1 + len(columns)
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    lines = [[f"`{name}`", *(column(group) for column in columns.values())] for name, group in groups.items()]
    lines = [[by, *columns], ["---"] * width, *lines]
    return "".join("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in r) + " |\n" for r in lines)


def page(results: dict[str, Any]) -> str:
    """README.md of what stands in results.json."""
    networks = {
        "options covered": covered,
        "configurations": len,
        "tensors": lambda rows: f"{min(r['tensors'] for r in rows)} to {worst(rows, 'tensors')}",
        "max difference": worst,
        "gradient": lambda rows: worst(rows, "gradient"),
        "saved and loaded back": lambda rows: "bit-equal" if all(r["bit-equal"] for r in rows) else "**differs**",
    }
    drawn = {
        "what": lambda rows: "; ".join(dict.fromkeys(r["test"][5:].replace("_", " ") for r in rows)),
        "comparisons": compared,
        "latents": lambda rows: worst(rows, what="latents"),
        "pictures": lambda rows: worst(rows, what="pictures"),
    }
    stepped = {"comparisons": compared, "difference": lambda rows: max(r["difference"] / r["max abs"] for r in rows)}
    return PAGE.format(
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        machine=results["machine"],
        networks=table("class", results["networks"], networks, "class"),
        pipelines=table("pipeline, scheduler", results["pipelines"], drawn),
        schedulers=table("scheduler", results["schedulers"], stepped),
    )


def main() -> None:
    parser, of_class = argparse.ArgumentParser(description=__doc__.splitlines()[0]), cases()
    names = [*of_class, "pipelines", "schedulers"]
    parser.add_argument("--only", choices=names, metavar="NAME", help=", ".join(names))
    only, file = parser.parse_args().only, FOLDER / "results.json"
    before = json.loads(file.read_text()) if only and file.exists() else {}
    tests = {"pipelines": ("test_pipelines.py", WITHOUT_TWIN), "schedulers": ("test_schedule.py",)}
    met = {k: run_tests(*v) if only in (None, k) else before.get(k, []) for k, v in tests.items()}
    networks = [row for row in before.get("networks", ()) if row["class"] != only]
    for kind, configurations in of_class.items():
        for name, build in configurations.items() if only in (None, kind) else ():
            with tempfile.TemporaryDirectory() as folder:
                networks.append(measure(kind, name, build(), pathlib.Path(folder)))
            print({k: v for k, v in networks[-1].items() if k != "options"}, flush=True)
    info = pathlib.Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.machine()]
    results = {
        "versions": {m.__name__: m.__version__ for m in (jax, torch, diffusers, transformers)},
        "machine": f"{os.cpu_count()} cores of an {cpu[0]}",
        "networks": sorted(networks, key=lambda row: names.index(row["class"])),
        **met,
    }
    FOLDER.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    (FOLDER / "README.md").write_text(page(results))


if __name__ == "__main__":
    main()
