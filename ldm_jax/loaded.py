"""What lies on disk as one object: what `ldm_jax.load` gives (entry.py makes it), whatever it holds.

    images = run.sample(4, prompts=["a red circle"]);   x = run.encode(images);   denoise = run.denoiser(prompts="a red circle")

Pictures that go in: PIL images, u8[N, H, W, 3], or floats in [0, 1]. Pictures that come out: f32[N, H, W, 3] in [0, 1]. What is
modelled, x, are these pictures in [-1, 1], or latents of them with the scale that diffusion sees.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from ldm_jax import plugins
from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.evaluation import bits, generate, subject, table
from ldm_jax.pipelines import Pipeline, Request, components, estimate, fitting, start
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.drawable import NAMED, Frame
from ldm_jax.pipelines.request import Prompts, Size
from ldm_jax.sampling.model import Space
from ldm_jax.sampling.settings import guidance_of, is_guided, pairs
from ldm_jax.training import restore, sampling

# How images are drawn: fields of Request, and the flag of `ldm evaluate` that each belongs to.
HOW = {
    **{field: field for field in ("steps", "guidance")},
    **{field: "guidance_interval" for field in ("t_lo", "t_hi")},
    "rescale": "guidance",
    "sampler": "sampler",
    "options": "sampler",
    **{field: name for name, options in NAMED[1:] for field in (name, options)},
}
UNGUIDED = {"guidance": 1.0, "guidance_method": "cfg", "guidance_schedule": "constant"}


class Coder(NamedTuple):
    """An autoencoder by itself, with the fields of a Drawable that coding pictures needs."""

    space: Space
    space_params: Any
    frame: Frame
    offload: bool = False


class Loaded(NamedTuple):
    """A run of `ldm train`, a published pipeline, or an autoencoder; `print` says what it holds, and which methods it offers.

    place     where it lies; holds: what it is, in a line
    pipeline  what it draws with, None for what draws nothing; its methods take every option of pipelines.Request
    run       the diffusion run behind it, with its experiment and parameters; None for anything else
    coder     () -> the autoencoder by itself; None for what is none
    measured  what `evaluate` measures; of a published autoencoder (data, out) -> that; None for a published pipeline
    step      of the checkpoint, None for what is no run; programs: what `sample` has compiled

    A method raises ValueError where it does not apply, and for what does not fit; TypeError for an option that it does not read.
    """

    place: str
    holds: str
    pipeline: Pipeline | None = None
    run: restore.Restored | None = None
    coder: Callable[[], Coder] | None = None
    measured: subject.Subject | Callable[[str, str], subject.Subject] | None = None
    step: int | None = None
    programs: dict[Any, Callable[..., Any]] | None = None

    def __repr__(self) -> str:
        return f"<{self.place}: {self.holds}\n offers {', '.join(self.offers)}>"

    @property
    def offers(self) -> list[str]:
        """The names of the methods that apply."""
        names = []
        if (pipeline := self.pipeline) is not None:
            takes, of_words = pipeline.takes, "text_to_image" if pipeline.takes.prompts else "draw"
            if pipeline.kind.instructs:
                names += ["edit"]
            elif takes.channels:
                names += ["image_to_image" if takes.channels == 1 else "inpaint"]
            elif takes.image:
                names += ["sample", "inpaint" if takes.mask else "from_picture", "image_to_image"]
            else:
                names += ["sample", of_words, "image_to_image", "inpaint", "vary", "interpolate", "invert", "denoiser"]
                names += ["likelihood"] if pipeline.space.bounded and pipeline.kind.darkest == -1 else []
        names += ["encode", "decode"] if self.pipeline or self.coder else []
        return names + (["evaluate"] if self.measured else [])

    def _expect(self, method: str, name: str = "") -> None:
        """Raise ValueError unless `method` applies; the message is about `name`, which needs it."""
        if method not in self.offers:
            there = ", ".join(self.offers)
            raise ValueError(f"{self.place} is {self.holds}: it has no {name or method}; it offers {there}")

    def _classes(self, labels: Sequence[int | str] | int | str | None) -> list[int] | None:
        """Classes by number, of numbers and names. ValueError for what is no class."""
        if labels is None:
            return None
        labels = [labels] if isinstance(labels, int | str) else list(labels)
        count, names = self.pipeline.takes.classes, self.pipeline.class_names
        if count is None:
            raise ValueError(f"labels: {self.place} is {self.holds}, which has no classes")
        numbers = {name: number for number, name in names.items()}
        for label in labels:
            number = numbers.get(label, -1) if isinstance(label, str) else label
            if not 0 <= number < count:
                some = f" or a name, such as {next(iter(numbers))!r}" if numbers else ""
                raise ValueError(f"label {label!r} is no class of {self.place}; expected 0 to {count - 1}{some}")
        return [numbers[label] if isinstance(label, str) else int(label) for label in labels]

    def _drawn(self, way: str, *words: Any, **options: Any) -> np.ndarray:
        self._expect(way)
        _check_names(way, options, Request._fields)
        if options.get("labels") is not None:
            options["labels"] = self._classes(options["labels"])
        return getattr(self.pipeline, way)(*words, **options)

    # --- pictures ---

    def sample(
        self, num: int = 1, prompts: Prompts | None = None, labels: Any = None, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """`num` pictures: those of `ldm sample` for a run, of `ldm generate` for a published pipeline.

        Prompts and labels (numbers or names) are repeated in order; without any, every class in turn, or captions that a run has kept
        of its data. The options are the fields of pipelines.Request: steps, guidance, sampler, batch_size, quiet, ...
        """
        self._expect("sample")
        _check_names("sample", options, Request._fields)
        if num < 1:
            raise ValueError(f"num is {num}, expected at least 1")
        if prompts is not None and not self.pipeline.takes.prompts:
            raise ValueError(f"prompts: {self.place} is {self.holds}, which takes none")
        labels, prompts = self._classes(labels), [prompts] if isinstance(prompts, str) else prompts
        how = {name: value for name, value in options.items() if name in HOW}
        if self.run is not None and options.keys() <= {*HOW, "batch_size", "quiet"}:
            return self._of_run(num, prompts, labels, seed, Request(**how), options)
        if prompts:
            options["prompts"] = [prompts[i % len(prompts)] for i in range(num)]
        way = "text_to_image" if self.pipeline.takes.prompts else "draw"
        return self._drawn(way, **{"prompts": None, "batch_size": 4} | options, num=num, labels=labels, seed=seed)

    def _of_run(
        self, num: int, prompts: Any, labels: Any, seed: int, request: Request, options: Mapping[str, Any]
    ) -> np.ndarray:
        run, settings = self.run, self.pipeline.settings(request)
        sampling.check(settings)
        what = generate.asked(run, num, labels or (), prompts or ())
        key = settings.name, pairs(settings.options), guidance_of(settings), is_guided(settings)
        if key not in self.programs:
            self.programs[key] = generate.program(run, settings)
        images = generate.draw(
            run,
            settings,
            what,
            count=num,
            seed=seed,
            tokenizer=run.experiment.tokenizer,
            batch_size=options.get("batch_size") or run.experiment.sample_batch_size,
            quiet=options.get("quiet", True),
            compiled=self.programs[key],
        )
        return np.concatenate([*images]).astype(np.float32) / 255

    def text_to_image(self, prompts: Prompts, negative: Prompts | None = None, **options: Any) -> np.ndarray:
        """One picture for each prompt, or `num` of one."""
        return self._drawn("text_to_image", prompts, negative, **options)

    def draw(self, num: int = 1, labels: Any = None, **options: Any) -> np.ndarray:
        """`num` pictures without words: of classes, by number or name (None: every class in turn), or of nothing."""
        return self._drawn("draw", num, labels=labels, **options)

    def image_to_image(
        self, prompts: Prompts | None, images: Any, negative: Prompts | None = None, **options: Any
    ) -> np.ndarray:
        """Pictures that begin with `images`, noised so far as strength says (0.8)."""
        return self._drawn("image_to_image", prompts, images, negative, **options)

    def inpaint(
        self, prompts: Prompts | None, images: Any, masks: Any, negative: Prompts | None = None, **options: Any
    ) -> np.ndarray:
        """`images` drawn anew where `masks` are white."""
        return self._drawn("inpaint", prompts, images, masks, negative, **options)

    def from_picture(self, prompts: Prompts | None, images: Any, **options: Any) -> np.ndarray:
        """Pictures from noise under `images` as their condition: enlarged, or seen by an image encoder."""
        return self._drawn("from_picture", prompts, images, **options)

    def edit(self, prompts: Prompts, images: Any, negative: Prompts | None = None, **options: Any) -> np.ndarray:
        """`images` as the instructions `prompts` change them (InstructPix2Pix)."""
        return self._drawn("edit", prompts, images, negative, **options)

    def vary(self, prompts: Prompts | None, images: Any, source: Prompts = "", **options: Any) -> np.ndarray:
        """Variations of `images`: inverted under `source`, what they show, and drawn anew under `prompts`."""
        return self._drawn("vary", prompts, images, source, **options)

    def interpolate(
        self, prompts: tuple[str, str] | str | None = None, seeds: tuple[int, int] | int = 0, **options: Any
    ) -> np.ndarray:
        """`num` pictures (8) on the way from one prompt to another, from one seed to another, or both."""
        return self._drawn("interpolate", prompts, seeds, **options)

    def invert(self, prompts: Prompts | None, images: Any, **options: Any) -> np.ndarray:
        """The noise f32[N, *shape], of about unit variance, from which the same prompts draw `images` again without guidance."""
        return self._drawn("invert", prompts, images, **options)

    # --- what is modelled ---

    def encode(self, images: Any, size: Size | None = None) -> np.ndarray:
        """x f32[N, *shape] of pictures: their latents as diffusion sees them (the mean of a posterior), or the pixels in [-1, 1].

        A diffusion run scales pictures to its resolution; others take theirs, cut to a multiple of what the networks halve, with a
        warning. `size` (H, W) scales them to another. Floats are not scaled.
        """
        self._expect("encode")
        coder = self.pipeline or self.coder()
        return np.asarray(start.encoded(coder, images, size, len(fitting.rows_of(images)))[0])

    def decode(self, x: Array | np.ndarray) -> np.ndarray:
        """Pictures f32[N, H, W, 3] in [0, 1] of x f32[N, *shape]."""
        self._expect("decode")
        coder, x = self.pipeline or self.coder(), np.asarray(x, np.float32)
        if x.ndim != 4 or x.shape[-1] != coder.frame.channels:
            raise ValueError(f"x has shape {x.shape}, expected [N, h, w, {coder.frame.channels}]")
        return start.pictures(coder, x)

    @property
    def process(self) -> Process:
        """The diffusion process, t = 0 data and t = 1 noise."""
        self._expect("denoiser", "process")
        return self.pipeline.course(self.pipeline.defaults, self.pipeline.frame.shape(None)[1]).model.process

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w, C) of one x: pixels or latents of a picture of the size that the network was trained for."""
        self._expect("encode", "shape")
        return (self.pipeline or self.coder()).space.shape

    def denoiser(self, prompts: Prompts | None = None, labels: Any = None, **options: Any) -> Denoiser:
        """denoise(x_t f32[B, *shape], t scalar or [B]) -> Clean(x, eps), which diffusion.samplers.sample takes with `process`.

        Without prompts and labels nothing is said to the network. guidance None is that of the run or the pipeline, 1 is none; negative
        and the other options of guidance, and size, are those of pipelines.Request. For one prompt or label, or none, B may be any
        number; for several it is theirs.
        """
        self._expect("denoiser")
        _check_names("denoiser", options, estimate.READS)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        request = Request(prompts=prompts, labels=self._classes(labels), **options)
        return estimate.denoiser(self.pipeline, request)

    # --- measured ---

    def likelihood(
        self,
        images: Any,
        prompts: Prompts | None = None,
        labels: Any = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Bits a dimension f64[N] of pictures in 8 bits under a model of pixels, unguided, by the probability-flow ODE.

        Floats in [0, 1] are rounded to 8 bits, which are then dequantised by `seed`. `steps` of fourth order (None: as many as the
        sampler has). Prompts and labels are those of the pictures, one or N; without any, nothing is said to the network. The mean
        over a split is what `ldm evaluate --metrics=bits` gives.
        """
        self._expect("likelihood")
        pipeline, prompts = self.pipeline, [prompts] if isinstance(prompts, str) else prompts
        rows, size = start.framed(pipeline, images, None)
        levels = np.round(L.pixels(rows, size) * 255).astype(np.uint8)
        asked = Request(prompts=prompts, labels=self._classes(labels), num=len(levels), **UNGUIDED)
        settings = pipeline.settings(asked)
        (cond,) = estimate.conditions(pipeline, asked, settings, size)
        model, steps = pipeline.course(settings, size).model, settings.steps if steps is None else steps
        with components.on_device(pipeline.params, pipeline.offload) as params:
            return bits.of_images(model, params, cond, levels, steps=steps, seed=seed, batch_size=batch_size)

    def evaluate(
        self, metrics: str | Sequence[str], num: int | None = None, *, quiet: bool = True, **options: Any
    ) -> dict[str, Any]:
        """The row that `ldm evaluate` prints, which is appended to metrics.jsonl of the run as well.

        metrics   'fid,kid' or ['fid', 'kid']; num: how many images (1000)
        options   the flags of `ldm evaluate`, with '_' in the place of '-': features, reference, samples, prompts, labels, seed,
                  subset, out, and those of the metrics; for a published autoencoder data, the config whose images it is shown,
                  besides. How to draw, by the fields of pipelines.Request: steps, guidance, sampler, ...
        """
        self._expect("evaluate")
        options = {"num": num, **options}
        measured = self.measured
        if not isinstance(measured, subject.Subject):
            measured = measured(options.pop("data", ""), options.get("out", ""))
        flags = {HOW.get(name, name): _flag(value) for name, value in options.items() if value is not None}
        _check_names("evaluate", flags, (*subject.FLAGS, *HOW.values(), *(flag.name for flag in table.flags())))
        names, in_use = metrics.split(",") if isinstance(metrics, str) else metrics, plugins.loaded()
        asked = subject.Asked(tuple(names), flags, plugins=plugins.contents(in_use), quiet=quiet)
        way = subject.way_of(measured, asked)
        if way.draws:
            settings = self.pipeline.settings(Request(**{name: options[name] for name in HOW if name in options}))
            sampling.check(settings)
            asked = asked._replace(settings=settings)
        return subject.measured(measured, asked, self.step if way.several else None)


def _check_names(method: str, options: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise TypeError for an option of another name."""
    for name in options:
        if name not in names:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")


def _flag(value: Any) -> Any:
    """A value as a flag has it: several between commas, paths as text."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value
