"""Images from a trained run, in batches of one size, so that one compilation serves any number of them.

Image i is drawn from fold_in(key(seed), i), of label i mod K or prompt i mod P: it depends on the checkpoint, the settings, the seed
and i alone. What words and numbers cannot say, a picture to fill in or to enlarge, is image i mod M of a split that was held out.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ldm_jax.data import Tokenizer, tokenize
from ldm_jax.data.subset import spread
from ldm_jax.evaluation import images as images_
from ldm_jax.kernels import heap, mesh
from ldm_jax.runs.stopped import Stopped
from ldm_jax.sampling import keys
from ldm_jax.sampling.backwards import finite
from ldm_jax.sampling.draw import batches
from ldm_jax.sampling.model import to_uint8
from ldm_jax.training import conditioning, sampling, streams
from ldm_jax.training.restore import Restored


class NotFinite(Stopped):
    """An image came out NaN or infinite; `images` u8[H, W, 3] by number are those of its batch that did not."""

    def __init__(self, bad: Sequence[int], images: dict[int, np.ndarray], why: str):
        self.images = images
        super().__init__(f"image {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''} is not finite: {why}")


class Asked(NamedTuple):
    """What each image is asked to show: `labels` i32[N] and N `prompts`; None where the model takes none.

    `source`: the images that the other conditions are read from, in order and repeated, a part of the split called `split`; None where
    there is no such condition.
    """

    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    source: Any = None
    split: str = ""


def held_out(run: Restored, split: str, count: int) -> Any:
    """The images of a split, `count` at most and evenly spread, that conditions are read from. ValueError for a split of latents."""
    source = streams.source(images_.of_split(run.experiment, split), "report")
    if getattr(source, "is_latent", False):
        name = run.model.conditioning.rows[0]
        raise ValueError(f"split:{split} of this run holds latents; its condition {name} is read from images")
    return spread(source, min(count, len(source)))


def asked(
    run: Restored, count: int, labels: Sequence[int] = (), prompts: Sequence[str] = (), split: str | None = None
) -> Asked:
    """Labels and prompts of `count` images, repeated in order.

    Without labels every class comes in turn; without prompts the captions that the run has kept of its data. Where a condition is read
    from images, these are those of `split` (None: the tuning split), and so are labels and prompts that are not given. Raises
    ValueError for a label that is no class, or for what the model does not take; warns of words that its tokenizer does not know,
    and of prompts that it clips.
    """
    takes, classes = run.model.conditioning, sampling.classes(run.model)
    numbers = text = source = None
    if takes.rows:
        split = split or run.experiment.split.tune
        source = held_out(run, split, count)
        its = [source[i] for i in range(len(source))] if not (labels and prompts) else []
        labels = labels or [int(item["label"]) for item in its if classes]
        prompts = prompts or [item["text"] for item in its if "prompts" in takes.takes]
    if labels and not classes:
        raise ValueError("--label: this model takes no labels")
    if prompts and "prompts" not in takes.takes:
        raise ValueError("--text: this model takes no captions")
    if classes:
        numbers = list(labels or range(classes))
        if wrong := [label for label in numbers if not 0 <= label < classes]:
            raise ValueError(f"--label={wrong[0]}: expected 0 to {classes - 1}")
        numbers = np.resize(np.asarray(numbers, np.int32), count)
    if "prompts" in takes.takes:
        lines = list(prompts) or run.dataset["prompts"]
        if not lines:
            raise ValueError("--text: the data set has no captions to draw from; give a prompt")
        text = [lines[i % len(lines)] for i in range(count)]
        for line in tokenize.lost(run.experiment.tokenizer, dict.fromkeys(text), seconds=5):
            warnings.warn(line, stacklevel=2)
    return Asked(numbers, text, source, split if takes.rows else "")


def batch_of(run: Restored, what: Asked, rows: np.ndarray, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """The batch that the conditions of images `rows` i[B] are read from."""
    batch = {"label": np.zeros(len(rows), np.int32)}
    if what.source is not None:
        batch |= streams.items(run.experiment, what.source, rows % len(what.source))
    if what.labels is not None:
        batch["label"] = what.labels[rows]
    if what.prompts is not None:
        encoded = {text: tokenizer.encode(text) for text in {what.prompts[i] for i in rows}}
        batch["tokens"] = np.stack([encoded[what.prompts[i]] for i in rows])
    return batch


def shown(run: Restored, what: Asked, seed: int, count: int) -> dict[str, np.ndarray]:
    """{condition: u8[count, H, W, 3]}, what the first images were drawn under, for a grid beside them."""
    takes = run.model.conditioning
    if not any(condition.show for condition in takes.conditions):
        return {}

    @jax.jit
    def pictures(frozen: Any, batch: dict[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
        values = conditioning.read(takes, frozen, batch, keys, drawing=True)
        return {c.name: to_uint8(c.show(values[c.name])) for c in takes.conditions if c.show}

    rows = np.arange(count)
    drawn = pictures(run.frozen, batch_of(run, what, rows, run.experiment.tokenizer), keys.image_keys(seed, rows))
    return {name: np.asarray(value) for name, value in drawn.items()}


BALANCES = ("equal", "random", "dataset")


def balanced(balance: str, count: int, num_classes: int, seed: int, training: Any = None) -> np.ndarray:
    """Labels i32[count] in one of the balances, which move FID, so that a figure has to name it.

    equal: every class in turn. random: drawn evenly by `seed`, as published figures of 50,000 samples are. dataset: those of
    `count` images of the source `training` at even distances, so that a class is as frequent as there. ValueError for another word.
    """
    if balance == "equal":
        return np.arange(count, dtype=np.int32) % num_classes
    if balance == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count, dtype=np.int32)
    if balance != "dataset":
        raise ValueError(f"balance of labels {balance!r} is unknown; there are {', '.join(BALANCES)}")
    rows = np.arange(count) * len(training) // count
    labels = getattr(training, "labels", None)  # of all images at once, where no image has to be decoded for it
    return np.asarray(
        [training[int(i)]["label"] for i in rows] if labels is None else np.asarray(labels)[rows], np.int32
    )


def program(run: Restored, settings: sampling.Settings) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What `draw` calls, compiled once for each shape of its arguments; steps, grid and scale of guidance are among these."""
    by_row = mesh.batch_sharding(mesh.make_mesh())
    generate, show = sampling.make_generate(run.model, settings), sampling.space(run.model).show

    def drawn(params: Any, rows: Any, times: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        parameters, frozen = params
        x = generate(parameters, frozen, *rows, times, scale)
        return show(x), finite(x)  # as bytes, what is not finite is black

    return heap.settled(jax.jit(drawn, out_shardings=(by_row, by_row)))


def draw(
    run: Restored,
    settings: sampling.Settings,
    what: Asked,
    *,
    count: int,
    seed: int,
    tokenizer: Tokenizer | None,
    batch_size: int = 128,
    quiet: bool = False,
    compiled: Callable[..., Any] | None = None,
) -> Iterator[np.ndarray]:
    """Images 0 .. count - 1 as u8[b, H, W, 3], in order, b at most `batch_size`. Raises NotFinite.

    compiled: what `program` made of this run and these settings, for whoever draws several times.
    """
    compiled = compiled or program(run, settings)
    by_row = mesh.batch_sharding(mesh.make_mesh())
    keys_of = jax.jit(lambda rows: keys.image_keys(seed, rows), out_shardings=by_row)

    def rows_at(rows: np.ndarray) -> tuple[jax.Array, dict[str, np.ndarray]]:
        return keys_of(rows), batch_of(run, what, rows, tokenizer)

    times, scale, start = sampling.make_times(run.model, settings), jnp.float32(settings.guidance), 0
    with tqdm(total=count, unit="img", disable=quiet, leave=False, dynamic_ncols=True) as bar:
        for images, whole in batches(
            compiled, (run.params, run.frozen), rows_at, times, scale, count=count, batch_size=batch_size
        ):
            if not whole.all():
                bad, good = ([start + int(i) for i in np.flatnonzero(which)] for which in (~whole, whole))
                how = f"the sampler {settings.name!r} with {settings.steps} steps, guidance {settings.guidance:g}"
                raise NotFinite(bad, {i: images[i - start] for i in good}, f"{how} and its options ran off")
            yield images
            bar.update(len(images))
            start += len(images)
