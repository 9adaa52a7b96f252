"""A run that a classifier of noisy data guides (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    eps = eps_theta(x_t) - scale sigma grad log p(y | x_t, t),      y the class that an image is drawn for

The classifier is a finished run of the task noisy_classifier, with the process and the space of the run that it guides. It acts on
the estimate after classifier-free guidance, so that both may be combined (their section 4.3): with --guidance=0 the
denoiser draws its null class and the classifier alone says which class it is to be.

Parameters and scale lie in params['classifier'] = {'network', 'scale'}: arguments of the compiled program, which serves every scale.
"""

import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax import runs
from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.sampling.model import Cond
from ldm_jax.training import facts, open_stage
from ldm_jax.training.experiment import Experiment, parse
from ldm_jax.training.restore import Restored
from ldm_jax.training.tasks import noisy_classifier

TASK = "noisy_classifier"


class Transform(NamedTuple):
    """An entry of sampling.model.Model.transforms: the classifier `module`, which was trained with `process`.

    is_off  whether the scale is 0: then the estimate is left as it is, to the bit
    """

    module: Any
    process: Process
    is_off: bool = False

    def __call__(self, denoise: Denoiser, params: Any, cond: Cond) -> Denoiser:
        """`denoise`, guided to the classes cond['target'] i32[B]."""
        if self.is_off:
            return denoise
        classifier = params["classifier"]
        log_prob = noisy_classifier.log_prob(self.module, classifier["network"], self.process, cond["target"])
        return guidance.classifier(denoise, log_prob, self.process, classifier["scale"])


class Classifier(NamedTuple):
    """A finished run of the task noisy_classifier. `params` are host arrays; `facts` name the latents; `sha256` the checkpoint."""

    workdir: pathlib.Path
    experiment: Experiment
    params: Any
    facts: facts.Facts
    sha256: str


def read(workdir: str, guides: Restored) -> Classifier:
    """The classifier in a folder, which is to guide a run: its newest checkpoint, its first average.

    Raises ValueError for a run of another task, for one that is not finished, and as `check`; FileNotFoundError for a folder without
    a run.
    """
    run = runs.read(pathlib.Path(workdir).absolute())
    run.expect(TASK)
    if not run.is_finished:
        raise ValueError(f"--classifier={workdir} is not finished; expected a classifier that no longer changes")
    step = run.step()
    params = run.params(step, run.average)[TASK]
    stated = facts.of_meta(run.meta(step))
    classifier = Classifier(run.workdir, parse(run.config), params, stated, run.identity(step))
    check(guides, classifier)
    return classifier


def check(run: Restored, classifier: Classifier) -> None:
    """Raise ValueError, which names what differs, unless the classifier has the process, the space and the classes of the run."""
    where, of, to = f"--classifier={classifier.workdir}", classifier.experiment, run.experiment
    t = np.linspace(0, 1, 17, dtype=np.float32)
    for f in ("alpha", "sigma"):
        if not np.allclose(getattr(of.process, f)(t), getattr(to.process, f)(t), rtol=1e-5, equal_nan=True):
            raise ValueError(
                f"{where} was trained with config.process {of.record['process']}; expected that of the run, "
                f"{to.record['process']}"
            )
    now = open_stage.facts_of(run.model.stage)
    trained, drawn = (f"latents {x[:12]}" if x else "pixels" for x in (_latents(classifier.facts), _latents(now)))
    if trained != drawn:
        raise ValueError(f"{where} was trained on {trained}; the run draws {drawn}: expected one first stage for both")
    whitening = {name: now[name] for name in (facts.MEAN, facts.STD) if name in now}
    facts.check(classifier.workdir, classifier.facts, whitening)
    if of.input.resolution != to.input.resolution:
        raise ValueError(
            f"{where} was trained on images of {of.input.resolution} pixels; the run draws {to.input.resolution}"
        )
    classes = run.model.conditioning.num_classes
    if classes and classes != of.network.num_classes:
        raise ValueError(f"{where} names {of.network.num_classes} classes; the run has {classes}")


def _latents(stated: facts.Facts) -> str:
    """The sha256 that names the latents, '' for pixels."""
    return str(stated.get(facts.FIRST_STAGE, ""))


def guided(run: Restored, classifier: Classifier, scale: float) -> Restored:
    """The run under the guidance of a classifier that was read for it, with a scale of at least 0."""
    transform = Transform(classifier.experiment.network, classifier.experiment.process, scale == 0)
    params = run.params | {"classifier": {"network": classifier.params, "scale": jnp.float32(scale)}}
    return run._replace(model=run.model._replace(classifier=transform), params=params)
