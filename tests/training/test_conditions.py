"""Each condition: what it reads of a batch, what it joins to the network's input, and a run with several that is trained and drawn."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from ldm_jax import cli, models, plugins
from ldm_jax.diffusion import loss as losses
from ldm_jax.diffusion.process import flow
from ldm_jax.models import MODELS
from ldm_jax.pipelines.drawable import Asked
from ldm_jax.training import conditioning, conditions, drawable, first_stage, frozen_networks, restore, sampling, spaces
from ldm_jax.training.conditions import low_resolution, masked_image
from ldm_jax.training.images import from_uint8
from ldm_jax.training.state import Averages, step_key
from ldm_jax.training.task import Context
from ldm_jax.training.tasks import diffusion
from ldm_jax.weights.tree_hash import tree_sha256
from tests.test_plugins import forget

KEY = jax.random.key(0)
SIDE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
X = np.asarray(from_uint8(jnp.asarray(IMAGES)))
KEYS = jax.random.split(KEY, 3)


def stage():
    """An autoencoder that makes a picture half as large, whitened."""
    network = MODELS["autoencoder_kl"](
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    params = models.init(network, jax.random.key(1), (SIDE, SIDE, 3))["params"]
    mean, std = np.array([0.1, -0.2], "f4"), np.array([2.0, 0.5], "f4")
    return first_stage.FirstStage(network, params, mean, std, (SIDE // 2, SIDE // 2, 2))


def channels(name, context, batch, **block):
    takes = conditions.make(context, {name: block})
    frozen = first_stage.frozen(context.stage) | conditioning.frozen(takes)
    return np.asarray(conditioning.complete(takes, {}, frozen, batch, KEYS)["channels"])


# --- masks and small pictures ----------------------------------------------------------------------------------------------


def test_masks_are_boxes_strokes_and_everything_by_the_key_of_their_row():
    keys = jax.random.split(KEY, 400)
    draw = jax.jit(jax.vmap(lambda key: masked_image.mask(key, SIDE, 0.25, 0.5, 1.0, 0.2)))
    masks = np.asarray(draw(keys))
    assert set(np.unique(masks)) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert abs((share == 1).mean() - 0.2) < 4 * (0.16 / 400) ** 0.5
    boxes = masks[share < 1][..., 0]
    rows, columns = boxes.max(2).sum(1), boxes.max(1).sum(1)
    # A box is a product of two intervals, of sides between a quarter and a half of 16 pixels, to a pixel.
    np.testing.assert_array_equal(boxes.sum((1, 2)), rows * columns)
    assert min(rows.min(), columns.min()) >= 3 and max(rows.max(), columns.max()) <= 9
    strokes = np.asarray(jax.vmap(lambda key: masked_image.brush(key, SIDE, 0.25, 0.5))(keys[:50]))
    assert 0.02 < strokes.mean() < 0.6 and (strokes.sum((1, 2, 3)) > 0).all()
    np.testing.assert_array_equal(draw(keys[:7]), masks[:7])


def test_masked_pictures_are_what_published_inpainting_networks_take():
    mask = np.zeros((3, SIDE, SIDE, 1), "f4")
    mask[:, 4:12, 2:9] = 1
    batch = {"image": jnp.asarray(IMAGES), "mask": jnp.asarray(mask)}
    plain = channels("masked_image", Context(space=spaces.images(SIDE)), batch)
    np.testing.assert_allclose(plain, np.concatenate([mask, np.where(mask == 1, 0, X)], -1), atol=1e-6)
    latent = stage()
    joined = channels("masked_image", Context(space=spaces.images(SIDE), stage=latent), batch)
    z = latent.network.apply({"params": latent.params}, jnp.where(mask == 1, 0, X), method="encode").mean
    np.testing.assert_array_equal(joined[..., :1], mask[:, ::2, ::2])
    np.testing.assert_allclose(joined[..., 1:], (z - latent.mean) / latent.std, atol=1e-5)


def test_a_small_picture_is_the_mean_of_its_pixels_and_is_augmented_in_training_alone():
    small = X.reshape(3, 4, 4, 4, 4, 3).mean((2, 4))
    np.testing.assert_allclose(low_resolution.reduce(jnp.asarray(X), 4), small, atol=1e-6)
    flat = np.full((1, 4, 4, 3), 0.3, "f4")
    np.testing.assert_allclose(low_resolution.enlarge(jnp.asarray(flat), 4), 0.3, atol=1e-6)
    context, batch = Context(space=spaces.images(SIDE)), {"image": jnp.asarray(IMAGES)}
    y = np.asarray(low_resolution.enlarge(jnp.asarray(small), 4))
    np.testing.assert_allclose(channels("low_resolution", context, batch), y, atol=1e-5)
    takes = conditions.make(context, {"low_resolution": {"noise": 0.5}})
    values = conditioning.read(takes, {}, batch, KEYS)["low_resolution"]
    s = np.asarray(values["level"])[:, None, None, None]
    assert (s > 0).all() and (s < 0.5).all() and len(np.unique(s)) == 3
    eps = (values["image"] - np.sqrt(1 - s**2) * y) / s
    assert abs(np.mean(eps)) < 4 / np.sqrt(eps.size) and abs(np.std(eps) - 1) < 4 / np.sqrt(2 * eps.size)
    drawn = conditioning.read(takes, {}, batch, KEYS, drawing=True)
    cond = conditioning.encode(takes, {}, {}, drawn)["channels"]
    np.testing.assert_allclose(cond, np.concatenate([y, np.zeros((3, SIDE, SIDE, 1))], -1), atol=1e-5)


class Copies:
    """A network whose output is w times what is joined to x_t: the masked picture, behind x_t and the mask."""

    in_channels, out_channels = 7, 3

    @staticmethod
    def init(key, x, t, cond):
        assert x.shape[-1] == 7 and not cond
        return {"params": {"w": jnp.ones(3)}}

    @staticmethod
    def apply(variables, x, t, cond, train=False, rngs=None):
        return variables["params"]["w"] * x[..., 4:]


def test_a_step_of_training_sees_the_mask_of_its_key_and_drops_it_by_its_own_probability():
    context = Context(
        network=Copies, process=flow(), space=spaces.images(SIDE), settings=sampling.Settings(), batch_size=3
    )
    context = context._replace(optimizer=lambda: optax.sgd(0.0), schedule=lambda step: 0.0, averages=Averages((100,)))
    takes = conditions.make(context, {"masked_image": {"drop": 0.5, "everything": 0.0}})
    task = diffusion.make(context._replace(conditioning=takes), prediction="x", drop=0.0)
    state = task.init(KEY)
    _, metrics = task.step(state, {}, {"image": jnp.asarray(IMAGES), "label": jnp.zeros(3, jnp.int32)})
    _, k_drop, k_loss, _ = jax.random.split(step_key(state), 4)
    name = conditioning.number("masked_image")
    rows = jax.random.split(jax.random.fold_in(k_drop, conditioning.number("rows")), 3)
    masks = [masked_image.mask(jax.random.fold_in(key, name), SIDE, 0.2, 0.8, 0.5, 0.0) for key in rows]
    dropped = np.asarray(jax.random.bernoulli(jax.random.fold_in(k_drop, name), 0.5, (3,)))
    assert 0 < dropped.sum() < 3, "another key of the state, for a test that sees both"
    shown = np.where(dropped[:, None, None, None], 0, X * (1 - np.stack(masks)))
    expected, _ = losses.diffusion_loss(
        lambda params, x, t, cond: jnp.asarray(shown), {}, flow(), "x", jnp.asarray(X), {}, k_loss, t=None
    )
    # Stratified times are the task's; the error of x does not depend on them.
    np.testing.assert_allclose(metrics["loss"], np.mean(expected), rtol=1e-5)


# --- frozen encoders -------------------------------------------------------------------------------------------------------


def test_an_image_encoder_gives_tokens_or_pooled_features_and_zeros_for_nothing(monkeypatch):
    network = MODELS["classifier"](num_classes=3, widths=(4, 8), norm_num_groups=2)
    params = models.init(network, KEY, (SIDE, SIDE, 3))["params"]
    monkeypatch.setattr(frozen_networks, "described", lambda name: (network, jax.eval_shape(lambda: params)))
    pooled = network.apply({"params": params}, X)[1]
    for gives, entry, shape in (("tokens", "text", (SIDE * SIDE // 16, 8)), ("pooled", "label", (16,))):
        block = {"image": {"name": "classifier:there", "gives": gives}}
        takes = conditions.make(Context(space=spaces.images(SIDE), load=lambda name: (network, params)), block)
        frozen = conditioning.frozen(takes)
        cond = conditioning.complete(takes, {}, frozen, {"image": jnp.asarray(IMAGES)}, KEYS)
        assert {name: e.shape for name, e in cond.items()} == {entry: (3, *shape)}
        assert conditioning.facts(takes) == {"condition.image.name": tree_sha256(params, described=False)}
        checked = conditions.make(Context(space=spaces.images(SIDE)), block)
        assert not conditioning.facts(checked) and conditioning.entries(checked, conditioning.frozen(checked))
        away = conditioning.away(takes, conditioning.read(takes, frozen, {"image": jnp.asarray(IMAGES)}, KEYS))
        assert not np.any(away["image"])
    np.testing.assert_allclose(cond["label"], pooled, atol=1e-6)


def test_a_published_text_encoder_reads_captions_as_its_pipeline_does(tmp_path):
    tiny = pytest.importorskip("tests.pipelines.published")
    from ldm_jax.pipelines import components
    from ldm_jax.pipelines.conditions import encode
    from ldm_jax.weights import load
    from ldm_jax.weights import tokenizer as tokenizers

    tiny.text_encoder().save_pretrained(tmp_path / "text_encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    takes = conditions.make(Context(load=frozen_networks.load), {"published_text": {"path": str(tmp_path), "skip": 1}})
    masked = conditions.make(Context(), {"published_text": {"path": str(tmp_path), "masked": True}})
    words = conditions.published_text.published_text.tokenizer(str(tmp_path))
    texts = ["a red cat", "", "far more letters than it reads at once"]
    batch = {"tokens": jnp.asarray(np.stack([words.encode(text) for text in texts]))}
    states = conditioning.complete(takes, {}, conditioning.frozen(takes), batch, KEYS)["text"]
    network, params = load(tmp_path, "text_encoder")
    encoder = components.TextEncoder(
        tokenizers.load(tmp_path, "tokenizer", padding="end"), components.Part(network, params, {})
    )
    parts = components.Parts("", None, None, (encoder,), None, {})
    with pytest.warns(UserWarning, match="clipped"):
        theirs, _ = encode(parts, encoder, texts, skip=1)
    np.testing.assert_allclose(states, theirs, atol=1e-5)
    assert not words.fits(texts[2]) and words.fits(texts[0])
    np.testing.assert_array_equal(takes.conditions[0].null, words.encode(""))
    mask = conditioning.complete(masked, {}, conditioning.frozen(takes), batch, KEYS)["text_mask"]
    # Begin, seven letters, end; begin and end.
    assert mask.sum(1).tolist() == [9, 2, tiny.LENGTH]


# --- a run with several, one of them a plug-in -----------------------------------------------------------------------------

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "conditions.md"
CONFIG = """
from tests.training import tiny
def get_config(arg=''):
    c = tiny.config().copy_and_resolve_references().unlock()
    c.task = {'name': 'diffusion', 'prediction': 'flow'}
    c.model = {'name': 'dit', 'in_channels': 8, 'out_channels': 3, 'patch_size': 8, 'hidden_size': 16, 'depth': 1, 'num_heads': 2,
               'num_classes': 4}
    c.condition = {'label': {'drop': 0.3}, 'masked_image': {'drop': 0.0}, 'contour': {'drop': 0.1, 'threshold': 0.3}}
    c.optimizer.update(learning_rate=0.05, warmup_images=0)
    c.ema.half_lives = (1,)
    c.train.update(images=32, checkpoint_every=0, pictures=2)
    return c
"""


def ldm(*words, code=0):
    forget()
    assert cli.main([str(word) for word in words]) == code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    ((name, text),) = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / name).write_text(text)
    (folder / "config.py").write_text(CONFIG)
    ldm(
        "train",
        f"--plugin={folder / name}",
        f"--config={folder / 'config.py'}",
        f"--workdir={folder / 'run'}",
        "--quiet",
    )
    yield folder / "run"
    forget()
    plugins._loaded.clear()


def test_a_run_of_several_conditions_is_drawn_from_rows_and_from_files(run, tmp_path, capsys):
    assert (run / "pictures" / "masked_image_0000004.png").is_file()
    words = ("sample", f"--workdir={run}", "--num=3", "--steps=2", f"--out={tmp_path / 'a'}")
    capsys.readouterr()
    ldm(*words)
    assert "conditions (masked_image, contour): the images of split:val, in order" in capsys.readouterr().out
    made_by = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert made_by["conditions"] == "split:val" and (tmp_path / "a" / "masked_image.png").is_file()
    restored = restore.restore(run)
    pipeline = drawable.pipeline(restored, "run")
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype("f4")
    mask = np.zeros((1, 32, 32, 1), "f4")
    mask[:, 8:24, 8:24] = 1
    labels = np.zeros(1, np.int32)
    asked = Asked(1, None, labels, (32, 32), images=picture, masks=mask)
    cond, away = (pipeline.condition(asked._replace(away=away)) for away in (False, True))
    np.testing.assert_allclose(
        cond["channels"][..., :4], np.concatenate([mask, (2 * picture - 1) * (1 - mask)], -1), atol=1e-5
    )
    # The mask is never dropped, and kept; class and contour are not.
    np.testing.assert_array_equal(cond["channels"][..., :4], away["channels"][..., :4])
    assert cond["channels"][..., 4].any() and not away["channels"][..., 4].any()
    assert cond["label"].tolist() == [0] and away["label"].tolist() == [4]
    drawn = [pipeline.inpaint(None, picture, mask, labels=[0], steps=2, guidance=w) for w in (1.0, 3.0)]
    assert drawn[0].shape == (1, 32, 32, 3) and np.abs(drawn[0] - drawn[1]).max() > 1e-3
    with pytest.raises(ValueError, match="run is conditioned on a picture, and needs one"):
        pipeline.draw(1)


def test_files_on_the_command_line_and_figures(run, tmp_path, capsys):
    for name, size in (("picture", (40, 32, 3)), ("mask", (40, 32))):
        Image.fromarray(np.random.default_rng(2).integers(0, 256, size, np.uint8)).save(tmp_path / f"{name}.png")
    flags = ("--steps=2", f"--out={tmp_path / 'out'}", "--quiet", "--label=1")
    picture, mask = f"--init-image={tmp_path / 'picture.png'}", f"--mask={tmp_path / 'mask.png'}"
    ldm("generate", f"--model={run}", picture, mask, *flags)
    assert (tmp_path / "out" / "000000.png").is_file()
    for words, said in (
        ((), "needs --init-image and --mask"),
        ((picture,), "needs --mask"),
    ):
        capsys.readouterr()
        ldm("generate", f"--model={run}", *words, *flags, code=2)
        assert said in capsys.readouterr().err
    ldm("evaluate", f"--workdir={run}", "--metrics=bits", "--num=4", "--steps=2", "--quiet")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["conditions"] == "split:test" and np.isfinite(row["bits"])
