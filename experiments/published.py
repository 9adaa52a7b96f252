"""How far ldm_jax is from the published torch classes, pipelines and schedulers: every figure measured anew.

    python -m experiments.published [--only NAME]        NAME: a class of ldm_jax.weights.FORMATS, 'pipelines' or 'schedulers'

torch, diffusers and transformers (requirements-test.txt) are here as oracles, in tiny configurations with random weights
everywhere: those of tests/oracle, which hold each of them to its tolerance. For a network: torch's folder is loaded, the
output and the gradient of L = sum_k <w_k, y_k> (y_k the outputs, w_k standard normal) are compared, and the folder that
weights.save writes is loaded back by torch. For pipelines and schedulers the tests themselves are run, and what each of their
comparisons met is written down. Writes README.md and results.json to published/; with --only it prints and writes nothing.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Else torch's threads spin while XLA's compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As in tests/conftest.py: compiling is nearly all of the time here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ldm_jax import pipelines, weights
from tests.oracle import test_autoencoder_kl, test_autoencoder_tiny, test_clip, test_dit, test_unet, test_vq
from tests.pipelines.published import stir

SEED = 0
FOLDER = pathlib.Path(__file__).with_suffix("")
# Tests in tests/oracle/test_pipelines.py that compare ours with ours.
WITHOUT_TWIN = ("round_trip", "themselves", "one_program", "offloaded", "single_file")

HEAD = """# Equality with the published torch code

`python -m experiments.published` makes this page and [results.json](results.json): {versions}; {machine}; float32 on the CPU, seed {seed}.
Tiny configurations, random weights everywhere; `tests/oracle` holds the same comparisons to their tolerances (1e-4 for outputs, 1e-3
relative for gradients, 2e-3 for pipelines).

- *max difference*: of all outputs, max |ours - torch's|, with the weights that ldm_jax read from the folder which torch saved.
- *gradient*: of L = sum over the outputs of <w, y>, w standard normal, with respect to the parameters: max |ours - torch's| in a
  tensor over the largest there (or over a thousandth of the largest in the network, where that is more).
- *saved and loaded back*: torch's folder, read by ldm_jax, written by it, and read by torch: names, dtypes and all bits.

"""


class Case(NamedTuple):
    """One configuration: torch's model, and what either side computes from the same inputs (images NHWC).

    saved: the model to save, where it is not `model`.
    """

    model: torch.nn.Module
    theirs: Callable[[torch.nn.Module], Sequence[torch.Tensor]]
    ours: Callable[[nn.Module, Any], Sequence[jax.Array]]
    saved: torch.nn.Module | None = None


class Network(NamedTuple):
    """What was measured on one configuration: max |y|, max |difference|, and of gradients relative to each tensor's largest."""

    kind: str
    configuration: str
    options: dict[str, Any]
    tensors: int
    output: float
    difference: float
    gradient: float
    bit_equal: bool


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def pictures(channels: int) -> np.ndarray:
    return np.random.default_rng(SEED).uniform(-1, 1, (2, 16, 24, channels)).astype(np.float32)


def unet(name: str) -> Case:
    model, _, _ = test_unet.build(name)
    x, t, cond, words = test_unet.inputs(name)
    return Case(
        model,
        lambda m: [nhwc(m(nchw(x), torch.tensor(t), **words).sample)],
        lambda m, params: [m.apply({"params": params}, x, t, cond)],
    )


def autoencoder_kl(name: str) -> Case:
    config = test_autoencoder_kl.CONFIGS[name]
    model, _, _ = test_autoencoder_kl.pair(config)
    x = pictures(config.get("in_channels", 3))

    def theirs(m):
        posterior = m.encode(nchw(x)).latent_dist
        return [nhwc(y) for y in (m.decode(posterior.mean).sample, posterior.mean, posterior.logvar)]

    def ours(m, params):
        image, posterior = m.apply({"params": params}, x)
        return [image, posterior.mean, posterior.logvar]

    return Case(model, theirs, ours)


def vq(name: str) -> Case:
    """Picture, latents and the loss of the codebook: the gradient goes straight through the nearest entry."""
    model, _, _ = test_vq.pair(name)
    x = test_vq.images(name, SEED)

    def theirs(m):
        z = m.encode(nchw(x)).latents
        decoded = m.decode(z)
        return [nhwc(decoded.sample), nhwc(z), decoded.commit_loss.mean()]

    def ours(m, params):
        image, quantized = m.apply({"params": params}, x)
        loss = (quantized.commitment + 0.25 * quantized.codebook).mean()
        return [image, m.apply({"params": params}, x, method="encode"), loss]

    return Case(model.eval(), theirs, ours)


def autoencoder_tiny(name: str) -> Case:
    config = test_autoencoder_tiny.CONFIGS[name]
    torch.manual_seed(SEED)
    model = stir(diffusers.AutoencoderTiny(**config))
    x = pictures(config.get("in_channels", 3))

    def theirs(m):
        z = m.encode(nchw(x)).latents
        return [nhwc(m.decode(z).sample), nhwc(z)]

    def ours(m, params):
        z = m.apply({"params": params}, x, method="encode")
        return [m.apply({"params": params}, z, method="decode"), z]

    return Case(model, theirs, ours)


def dit(name: str) -> Case:
    """One embedder for all blocks in training, and a copy of it for each in the file."""
    model, module, _ = test_dit.make_dit(name)
    saved = diffusers.DiTTransformer2DModel.from_config(model.config)
    saved.load_state_dict(model.state_dict())
    x, t, label, _, _ = test_dit.inputs(module, (model.config.sample_size,) * 2)
    return Case(
        model,
        lambda m: [nhwc(m(nchw(x), torch.tensor(t), torch.tensor(label).long()).sample)],
        lambda m, params: [m.apply({"params": params}, x, t, {"label": label})],
        saved,
    )


def pixart(name: str, size: tuple[int, int]) -> Case:
    model, module, _ = test_dit.make_pixart(name)
    x, t, _, text, mask = test_dit.inputs(module, size)
    words = {"encoder_hidden_states": torch.tensor(text), "encoder_attention_mask": torch.tensor(mask).float()}
    return Case(
        model,
        lambda m: [nhwc(m(nchw(x), timestep=torch.tensor(t), **words).sample)],
        lambda m, params: [m.apply({"params": params}, x, t, {"text": text, "text_mask": mask})],
    )


def clip(kind: str, text: str, vision: str) -> Case:
    """Every hidden state, pooled and projected; CLIPModel: embeddings and logits."""
    model, _, module, _ = test_clip.build(kind, test_clip.TEXTS[text], test_clip.VISIONS[vision])
    mask = test_clip.MASK
    if kind == "CLIPModel":
        tokens, pixels = test_clip.tokens_for(module.text), test_clip.pixels_for(module.vision)
        words = {"input_ids": torch.tensor(tokens), "pixel_values": nchw(pixels), "attention_mask": torch.tensor(mask)}
        arguments, names = (tokens, pixels, mask), ("logits_per_image", "text_embeds", "image_embeds")
        return Case(
            model,
            lambda m: [getattr(m(**words), name) for name in names],
            lambda m, params: [getattr(m.apply({"params": params}, *arguments), name) for name in names],
        )
    if "Text" in kind:
        tokens = test_clip.tokens_for(module)
        arguments, words = (tokens, 0, mask), {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    else:
        arguments = (test_clip.pixels_for(module),)
        words = {"pixel_values": nchw(arguments[0])}
    embeds = ("text_embeds" if "Text" in kind else "image_embeds") if "Projection" in kind else None

    def theirs(m):
        out = m(**words, output_hidden_states=True)
        return [*out.hidden_states, out.last_hidden_state, getattr(out, embeds or "pooler_output")]

    def ours(m, params):
        out = m.apply({"params": params}, *arguments)
        return [*out.hidden_states, out.last_hidden_state, getattr(out, embeds or "pooled")]

    return Case(model, theirs, ours)


def cases() -> dict[str, dict[str, Callable[[], Case]]]:
    """class -> configuration -> what builds it."""
    towers = list(zip(test_clip.TEXTS, test_clip.VISIONS))
    sizes = {"one block": [(8, 8), (4, 12)], "scaled positions": [(8, 8)]}
    found = {
        "AutoencoderKL": {name: functools.partial(autoencoder_kl, name) for name in test_autoencoder_kl.CONFIGS},
        "VQModel": {name: functools.partial(vq, name) for name in test_vq.CONFIGS},
        "AutoencoderTiny": {name: functools.partial(autoencoder_tiny, name) for name in test_autoencoder_tiny.CONFIGS},
        "DiTTransformer2DModel": {name: functools.partial(dit, name) for name in test_dit.DIT},
        "PixArtTransformer2DModel": {
            f"{name}, {h} x {w}": functools.partial(pixart, name, (h, w))
            for name in test_dit.PIXART
            for h, w in sizes.get(name, [(8, 8)])
        },
    }
    for name, (kind, *_) in test_unet.CONFIGS.items():
        found.setdefault(kind.__name__, {})[name] = functools.partial(unet, name)
    for kind in test_clip.FORMATS:
        found[kind] = {
            (vision if "Vision" in kind else text): functools.partial(clip, kind, text, vision)
            for text, vision in towers
        }
    return found


def measure(kind: str, configuration: str, case: Case, folder: pathlib.Path) -> Network:
    """Forward, gradient and files of one configuration; `folder` is empty."""
    saved = case.saved or case.model
    saved.save_pretrained(folder / "theirs")
    module, params = weights.load(folder / "theirs")
    weights.save(folder / "ours", module, params)
    state, again = saved.state_dict(), type(saved).from_pretrained(folder / "ours").state_dict()
    bit_equal = state.keys() == again.keys() and all(
        value.dtype == again[name].dtype and torch.equal(value, again[name]) for name, value in state.items()
    )
    expected, random = case.theirs(case.model), np.random.default_rng(SEED + 1)
    w = [random.standard_normal(y.shape).astype(np.float32) for y in expected]
    sum((y * torch.tensor(w_k)).sum() for y, w_k in zip(expected, w)).backward()
    gradients = {
        # Frequencies and the like have none.
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in case.model.named_parameters(remove_duplicate=False)
    }

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def ours(params):
        y = case.ours(module, params)
        return sum(jnp.vdot(w_k, y_k) for w_k, y_k in zip(w, y, strict=True)), y

    slopes, y = ours(params)
    pairs = [(np.asarray(a), b.detach().numpy()) for a, b in zip(y, expected, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    wanted = jax.tree.leaves(weights.from_state(module, gradients))
    # The bias of all keys changes no attention: its gradient is rounding alone.
    floor = 1e-3 * max(np.abs(e).max() for e in wanted)
    return Network(
        kind,
        configuration,
        weights.FORMATS[kind].config(module),
        len(state),
        max(float(np.abs(b).max()) for _, b in pairs),
        max(float(np.abs(a - b).max()) for a, b in pairs),
        max(
            float(np.abs(g - e).max() / max(np.abs(e).max(), floor))
            for g, e in zip(jax.tree.leaves(slopes), wanted, strict=True)
        ),
        bit_equal,
    )


class Recorder:
    """A pytest plugin: what each numpy.testing.assert_allclose of the tests that run met, and which tests failed.

    met: dicts of test, case (its parameters), subject (what was last built: see `watch`), what, scale (max |expected|), difference
    """

    def __init__(self, watch: Callable[[pytest.Item, Callable[[str], None]], Any]):
        self.watch, self.met, self.failed, self.subject = watch, [], set(), ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with pytest.MonkeyPatch.context() as patch:
            exact = np.testing.assert_allclose

            def compare(actual, desired, *args, **options):
                a, b = np.asarray(actual), np.asarray(desired)
                self.met.append(
                    {
                        "test": item.originalname.removeprefix("test_").replace("_", " "),
                        "case": re.sub(r"^.*\[|\]$", "", item.name) if "[" in item.name else "",
                        "subject": self.subject,
                        "what": "pictures" if b.shape[-1:] == (3,) else "latents",
                        "scale": float(np.abs(b).max()),
                        "difference": float(np.abs(a - b).max()),
                    }
                )
                return exact(actual, desired, *args, **options)

            patch.setattr(np.testing, "assert_allclose", compare)
            self.watch(item, patch, functools.partial(setattr, self, "subject"))
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def watch_pipelines(item, patch: pytest.MonkeyPatch, tell: Callable[[str], None]) -> None:
    """The subject is the pipeline whose folder is read, and the scheduler in it."""
    load = pipelines.load

    def and_tell(folder, *args, **options):
        index = json.loads((pathlib.Path(folder) / "model_index.json").read_text())
        tell(f"{index['_class_name']}, {index['scheduler'][1]}")
        return load(folder, *args, **options)

    patch.setattr(pipelines, "load", and_tell)


def watch_schedulers(item, patch: pytest.MonkeyPatch, tell: Callable[[str], None]) -> None:
    """The subject is the class that the test makes."""
    make = item.module.make

    def and_tell(name, **options):
        tell(name)
        return make(name, **options)

    patch.setattr(item.module, "make", and_tell)


def run_tests(file: str, watch: Callable, without: Sequence[str] = ()) -> list[dict]:
    """What the comparisons of a file in tests/oracle met. AssertionError naming the tests that failed."""
    recorder = Recorder(watch)
    chosen = ["-k", " and ".join(f"not {word}" for word in without)] if without else []
    path = pathlib.Path(__file__).parent.parent / "tests" / "oracle" / file
    pytest.main(["-q", "-p", "no:cacheprovider", str(path), *chosen], plugins=[recorder])
    assert not recorder.failed, f"failed, and no table is worth anything: {sorted(recorder.failed)}"
    return recorder.met


def values(option: Any) -> set[str]:
    """An option as words: a list of names as its names."""
    if isinstance(option, (tuple, list)) and option and all(isinstance(v, str) for v in option):
        return set(option)
    return {option if isinstance(option, str) else str(option)}


def covered(rows: Sequence[Network]) -> str:
    """Options that take more than one value in these configurations, with the values."""
    found: dict[str, set[str]] = {}
    for row in rows:
        parts = {k: v for k, v in row.options.items() if not isinstance(v, dict)}
        for prefix, part in row.options.items():
            parts |= {f"{prefix}.{k}": v for k, v in part.items()} if isinstance(part, dict) else {}
        for option, value in parts.items():
            found.setdefault(option, set()).update(values(value))
    return "; ".join(f"`{option}` {', '.join(sorted(v))}" for option, v in found.items() if len(v) > 1)


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in r) + " |" for r in lines)


def worst(rows: Iterable[dict], key: Callable[[dict], float] = lambda row: row["difference"]) -> float | str:
    return max(map(key, rows), default="-")


def page(networks: Sequence[Network], drawn: Sequence[dict], stepped: Sequence[dict]) -> str:
    """README.md."""
    kinds: dict[str, list[Network]] = {}
    for row in networks:
        kinds.setdefault(row.kind, []).append(row)
    figures = [max(r.difference for r in networks), max(r.gradient for r in networks)]
    parts = [
        HEAD.format(versions=", ".join(f"{k} {v}" for k, v in versions().items()), machine=machine(), seed=SEED),
        f"## Networks\n\nOver all {len(networks)} configurations: outputs within {figures[0]:.1e}, gradients within "
        f"{figures[1]:.1e} of each tensor's largest.\n",
        table(
            (
                "class",
                "options covered",
                "configurations",
                "tensors",
                "max difference",
                "gradient",
                "saved and loaded back",
            ),
            (
                (
                    f"`{kind}`",
                    covered(rows),
                    len(rows),
                    f"{min(r.tensors for r in rows)} to {max(r.tensors for r in rows)}",
                    max(r.difference for r in rows),
                    max(r.gradient for r in rows),
                    "bit-equal" if all(r.bit_equal for r in rows) else "**differs**",
                )
                for kind, rows in kinds.items()
            ),
        ),
        "\nEach configuration:\n",
        table(
            ("class", "configuration", "tensors", "max abs output", "max difference", "gradient"),
            (
                (f"`{r.kind}`", r.configuration, r.tensors, f"{r.output:.2g}", r.difference, r.gradient)
                for r in networks
            ),
        ),
        "\n## Pipelines\n\nThe same folder and initial noise on both sides, 4 to 10 steps; the parameters of a test are in "
        "its name there.\n",
    ]
    groups: dict[tuple, list[dict]] = collections.defaultdict(list)
    for row in drawn:
        groups[(*row["subject"].split(", "), row["test"])].append(row)
    parts.append(
        table(
            ("pipeline", "scheduler", "test", "comparisons", "latents", "pictures"),
            (
                (*key, len(rows), *(worst(r for r in rows if r["what"] == what) for what in ("latents", "pictures")))
                for key, rows in groups.items()
            ),
        )
    )
    if stepped:
        groups = collections.defaultdict(list)
        for row in stepped:
            groups[row["subject"]].append(row)
        parts += [
            "\n## Schedulers\n\nThe last state of diffusers' own loop against ours, on an exact Gaussian model evaluated at the "
            "number that the scheduler feeds; the difference is relative to max |x|.\n",
            table(
                ("scheduler", "comparisons", "max relative difference"),
                (
                    (f"`{name}`", len(rows), worst(rows, lambda r: r["difference"] / r["scale"]))
                    for name, rows in sorted(groups.items())
                ),
            ),
        ]
    return "\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    return {"jax": jax.__version__} | {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}


def machine() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = cases()
    names = [*found, "pipelines", "schedulers"]
    parser.add_argument("--only", choices=names, metavar="NAME", help=", ".join(names))
    only = parser.parse_args().only
    networks = []
    for kind, configurations in found.items():
        for name, build in configurations.items() if only in (None, kind) else ():
            with tempfile.TemporaryDirectory() as folder:
                networks.append(measure(kind, name, build(), pathlib.Path(folder)))
            row = networks[-1]
            print(f"{kind}, {name}: {row.difference:.1e}, gradient {row.gradient:.1e}, {row.bit_equal=}", flush=True)
    drawn = run_tests("test_pipelines.py", watch_pipelines, WITHOUT_TWIN) if only in (None, "pipelines") else []
    stepped = run_tests("test_schedule.py", watch_schedulers) if only in (None, "schedulers") else []
    for row in drawn + stepped:
        print(*(row[k] for k in ("subject", "test", "case", "what")), f"{row['difference']:.1e}", sep=", ")
    if only is None:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "README.md").write_text(page(networks, drawn, stepped))
        results = {"versions": versions(), "machine": machine(), "seed": SEED}
        results |= {"networks": [row._asdict() for row in networks], "pipelines": drawn, "schedulers": stepped}
        (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
