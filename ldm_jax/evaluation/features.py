"""Networks whose features are measured. `named` reads their name and place:

    inception[:FILE|:download]   FID (Heusel et al. 2017), sFID (Nash et al. 2021), the inception score (Salimans et al. 2016)
    classifier:DIR               a run of the task 'classifier': Fréchet distance, accuracy
    dinov2:DIR                   FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675), published with ViT-L/14
    clip:DIR                     CMMD (Jayasumana et al. 2024, arXiv:2401.09603), published with ViT-L/14 at 336 pixels; CLIP score

An extractor takes images u8[N, H, W, 3] and gives f32[N, dim]. Features of Inception-V3 make the figure FID; the same
distance over any other network's features is called fd_<name>, because the two are not comparable.

Inception enlarges images itself. For DINOv2 and CLIP the host resizes them with Pillow, bicubic with antialiasing, from bytes to
bytes, as the code published with both papers does. Floats in between, or the kernel of another library, give other features.
"""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax import weights
from ldm_jax.kernels import mesh
from ldm_jax.models.clip import CLIP, CLIPVision
from ldm_jax.models.dinov2 import Dinov2
from ldm_jax.models.inception import FEATURES, SIZE, InceptionV3
from ldm_jax.runs import checkpoint
from ldm_jax.training import open_stage, streams
from ldm_jax.training.images import from_uint8
from ldm_jax.weights import files, hub
from ldm_jax.weights import inception as inception_weights
from ldm_jax.weights.tree_hash import tree_sha256

Outputs = dict[str, Any]
# Mean and standard deviation of pixels in [0, 1], as the networks were trained.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_IMAGES = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_SIZE = 224


class Extractor(NamedTuple):
    """A feature network with its weights in it.

    `sha256` identifies the weights; `where` is CLIP's folder, in which the metric clip finds the text network. `resolution` is the side
    that the network works at, in pixels. `outputs` is images u8[N, H, W, 3] -> {'features': f32[N, dim]} and what else the network
    gives in the same run: 'logits' f32[N, K] (of a classifier, and of Inception without their bias, as its score is published) and
    'spatial' f32[N, 2023] (of Inception). Any N is run in batches of one size, the last one padded, so that there is one compile a
    resolution. Each batch is split over all devices. Of several processes all have the same images, call this together, and get the
    same numpy arrays.
    """

    name: str
    dim: int
    sha256: str
    resolution: int
    outputs: Callable[[Any], Outputs]
    where: str = ""

    def apply(self, images: Any) -> Any:
        """The features alone, f32[N, dim]."""
        return self.outputs(images)["features"]


def batched(
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    batch: int,
    resolution: int | None = None,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> Callable[[Any], Any]:
    """`Extractor.outputs` of function(params, u8[B, H, W, 3]), which gives one array f32[B, ...] or a tree of them.

    `batch` is rounded up to a multiple of the devices. Images must have `resolution` unless it is None. `prepare` is applied to each
    device's part of a batch on its host, while the devices are busy with the batch before.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, met {batch}")
    device_mesh = mesh.make_mesh()
    batch = streams.rows(device_mesh, batch)
    by_row = mesh.batch_sharding(device_mesh)
    params = jax.device_put(params, mesh.replicated(device_mesh))
    run = jax.jit(function, out_shardings=by_row)

    def outputs(images: Any) -> Any:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images {images.dtype}{list(images.shape)}, expected uint8[N, H, W, 3]")
        if resolution is not None and images.shape[1:3] != (resolution, resolution):
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]}, expected {resolution}x{resolution}")
        if len(images) == 0:
            raise ValueError("no images to extract features from")
        images, here, parts = np.asarray(images), by_row.addressable_devices_indices_map((batch,)), []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
            shards = [jax.device_put(prepare(padded[rows]), device) for device, rows in here.items()]
            shape = batch, *shards[0].shape[1:]
            parts.append(run(params, jax.make_array_from_single_device_arrays(shape, by_row, shards)))
            # At most one batch waits on the devices: otherwise all outputs could lie in their memory at once.
            parts[-2:-1] = mesh.to_host(parts[-2:-1])
        parts[-1:] = mesh.to_host(parts[-1:])
        return jax.tree.map(lambda *values: np.concatenate(values)[: len(images)], *parts)

    return outputs


def inception(path: str | None = None, feature: str = "2048", batch: int = 64) -> Extractor:
    """Inception-V3 of 2015-12-05 with the weights in `path`, else in $LDM_INCEPTION, else as downloaded earlier.

    The `path` 'download' downloads them now.

    `feature` is one of models.inception.FEATURES; only '2048' makes FID, and has 'spatial' and 'logits' beside it. Images may have
    any size. Raises ValueError that says how to get the weights where there are none.
    """
    if feature not in FEATURES:
        raise ValueError(f"unknown Inception feature {feature!r}; there are {list(FEATURES)}")
    params, sha256 = inception_weights.load(inception_weights.download() if path == "download" else path)
    names = {"features": feature}
    if feature == "2048":
        names |= {"spatial": "spatial", "logits": "logits_unbiased"}
    network = InceptionV3(tuple(names.values()))

    def function(params: Any, images: jax.Array) -> Outputs:
        outputs = network.apply({"params": params}, images)
        return {name: outputs[layer] for name, layer in names.items()}

    name = "inception" if feature == "2048" else f"inception_{feature}"
    return Extractor(name, FEATURES[feature], sha256, SIZE, batched(function, params, batch))


def own(
    function: Callable[[Any, jax.Array], Outputs],
    params: Any,
    *,
    dim: int,
    resolution: int,
    name: str = "own",
    sha256: str | None = None,
    batch: int = 64,
) -> Extractor:
    """An extractor of any function(params, f32[B, R, R, 3] in [-1, 1]) -> {'features': f32[B, dim], ...}.

    The default `sha256` is that of `params`. The name may not begin with 'inception': those figures are called FID.
    """
    if name.startswith("inception") or not name.isidentifier():
        raise ValueError(
            f"an extractor cannot be called {name!r}: expected an identifier that does not begin with inception"
        )

    def scaled(params: Any, images: jax.Array) -> Outputs:
        return {key: value.astype(jnp.float32) for key, value in function(params, from_uint8(images)).items()}

    outputs = batched(scaled, params, batch, resolution)
    return Extractor(name, dim, sha256 or tree_sha256(params), resolution, outputs)


def classifier(workdir: str) -> Extractor:
    """The newest checkpoint of a classifier that `ldm train` trained, with its 'logits'; the first average where the run has one.

    Images must have the resolution that it was trained at. Raises ValueError for a run of another task.
    """
    folder = pathlib.Path(workdir)
    config, params, step = open_stage.trained(folder, "classifier")
    params = params["classifier"]
    # In float32 the same weights give comparable figures on every machine.
    network, side = config.network.clone(dtype="float32"), config.input.resolution

    def function(params: Any, x: jax.Array) -> Outputs:
        logits, features = network.apply({"params": params}, x)
        return {"features": features, "logits": logits}

    shapes = jax.eval_shape(function, params, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    dim, sha256 = shapes["features"].shape[-1], checkpoint.identity(folder, step)
    return own(function, params, dim=dim, resolution=side, name="classifier", sha256=sha256)


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """u8[N, H, W, 3] -> u8[N, side, side, 3] by Pillow's bicubic kernel, which reaches as far as the reduction: no aliasing."""
    pictures = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(picture) for picture in pictures])


def centred(images: np.ndarray) -> np.ndarray:
    """The largest square in the middle of u8[N, H, W, 3]."""
    side = min(images.shape[1:3])
    top, left = ((length - side) // 2 for length in images.shape[1:3])
    return images[:, top : top + side, left : left + side]


def folder_sha256(folder: pathlib.Path) -> str:
    """The sha256 of the file of weights in a folder of `save_pretrained`; of shards, that of their sha256 in order."""
    path = files.find(folder)
    if path.suffix != ".json":
        return inception_weights.sha256(path)
    shards = sorted(set(files.read_json(path)["weight_map"].values()))
    return hashlib.sha256("".join(inception_weights.sha256(folder / shard) for shard in shards).encode()).hexdigest()


def _vision(
    function: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    batch: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    prepare: Callable[[np.ndarray], np.ndarray],
) -> Callable[[Any], Outputs]:
    """`Extractor.outputs` of function(params, f32[B, S, S, 3] less the mean, over the deviation in `statistics`)."""
    mean, deviation = np.float32(statistics)

    def scaled(params: Any, images: jax.Array) -> Outputs:
        # The reduced precision that accelerators multiply in by default shows in the distances.
        with jax.default_matmul_precision("highest"):
            return {"features": function(params, (images.astype(jnp.float32) / 255 - mean) / deviation)}

    return batched(scaled, params, batch, prepare=prepare)


def dinov2(folder: str, batch: int = 64) -> Extractor:
    """Dinov2Model or Dinov2WithRegistersModel in a folder of `save_pretrained` (or 'hub:OWNER/NAME'): the normalised class token.

    Images of any size are stretched to 224 x 224 (Stein et al. 2023, appendix; their code). Positions are interpolated as in the
    published code, by which those figures were made, and not as in transformers (models.dinov2). ValueError for another network.
    """
    path = hub.resolve(folder)
    network, params = weights.load(path)
    if not isinstance(network, Dinov2):
        raise ValueError(f"dinov2:{folder} holds a {type(network).__name__}, expected a Dinov2Model")
    network = network.clone(interpolate_offset=0.1)
    outputs = _vision(
        lambda params, x: network.apply({"params": params}, x).pooled,
        params,
        batch,
        IMAGENET,
        lambda images: resized(images, DINOV2_SIZE),
    )
    return Extractor("dinov2", network.hidden_size, folder_sha256(path), DINOV2_SIZE, outputs)


def clip(folder: str, batch: int = 64) -> Extractor:
    """CLIPModel or CLIPVisionModelWithProjection in a folder of `save_pretrained` (or 'hub:OWNER/NAME'): image embeddings.

    They are not normalised: cmmd and clip_score, which need length 1, divide by the length. Images may have any size; the square in the
    middle is resized to the resolution of the network. ValueError for another network.
    """
    path = hub.resolve(folder)
    network, params = weights.load(path)
    if isinstance(network, CLIP):
        network, params = network.vision, params["vision"]
    if not isinstance(network, CLIPVision) or network.projection_dim is None:
        raise ValueError(
            f"clip:{folder} holds a {weights.class_of(network)}, expected CLIPModel or CLIPVisionModelWithProjection"
        )
    outputs = _vision(
        lambda params, x: network.apply({"params": params}, x).image_embeds,
        params,
        batch,
        CLIP_IMAGES,
        lambda images: resized(centred(images), network.image_size),
    )
    return Extractor("clip", network.projection_dim, folder_sha256(path), network.image_size, outputs, folder)


NAMES: dict[str, Callable[[str], Extractor]] = {
    "inception": inception,
    "classifier": classifier,
    "dinov2": dinov2,
    "clip": clip,
}


def named(what: str) -> Extractor:
    """The extractor `name[:WHERE]` of NAMES, as the module docstring lists them. ValueError for any other."""
    name, _, where = what.partition(":")
    if name not in NAMES or not (where or name == "inception"):
        raise ValueError(
            f"features {what!r}; expected inception[:FILE|:download], classifier:DIR, dinov2:DIR or clip:DIR"
        )
    return NAMES[name](where)
