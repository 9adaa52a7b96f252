"""The metric clip: CLIP score (Hessel et al. 2021, arXiv:2104.08718, eq. 1), the cosine of CLIP's embeddings of an image and a text.

    score(image, text) = w max(cos(image, text), 0)

with w = 100, the scale on which text-to-image models report its mean; Hessel et al. use w = 2.5 and begin every caption with "A photo
depicts". Networks differ in scale: figures of ViT-B/32 and of ViT-L/14 are not comparable.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax import weights
from ldm_jax.evaluation import one_pass
from ldm_jax.evaluation.metrics import GENERATED, PROMPTS, Case, Figure, Metric
from ldm_jax.models.clip import CLIP, CLIPText
from ldm_jax.weights import hub, tokenizer

BATCH = 64


def text_embeds(folder: str | pathlib.Path, prompts: Sequence[str]) -> np.ndarray:
    """The projected embeddings f32[N, P], not normalised, of N prompts by CLIPModel's text network or CLIPTextModelWithProjection.

    The folder is one of `save_pretrained` (or 'hub:OWNER/NAME'), with the tokenizer beside the network. Prompts that are longer
    than the network reads are truncated. ValueError for another network or a tokenizer that does not fit it.
    """
    path = hub.resolve(folder)
    network, params = weights.load(path)
    if isinstance(network, CLIP):
        network, params = network.text, params["text"]
    if not isinstance(network, CLIPText) or network.projection_dim is None:
        expected = "CLIPModel or CLIPTextModelWithProjection"
        raise ValueError(f"clip:{folder} holds a {weights.class_of(network)}, expected {expected}")
    # Captions of generated images repeat: each text is embedded once.
    texts, where = np.unique(np.asarray(prompts, np.str_), return_inverse=True)
    read = tokenizer.load(path, vocab_size=network.vocab_size)
    length = network.max_position_embeddings
    tokens = np.asarray(read(texts.tolist(), padding="max_length", max_length=length, truncation=True)["input_ids"])
    run = jax.jit(lambda params, tokens: network.apply({"params": params}, tokens).text_embeds)
    padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % BATCH, axis=0)])
    with jax.default_matmul_precision("highest"):
        parts = [np.asarray(run(params, part)) for part in padded.reshape(-1, BATCH, length)]
    return np.concatenate(parts)[where]


def score(image_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
    """The score f64[N] in [0, 100] of each image; its mean is the figure of a set. Embeddings f[N, P] need no length of 1.

    ValueError for other shapes.
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        shapes = f"{image_embeds.shape} and {text_embeds.shape}"
        raise ValueError(f"embeddings of images and texts of shapes {shapes}, expected twice the same [N, P]")
    # einsum casts a buffer at a time; the embeddings may be a memory-mapped file.
    dot = functools.partial(np.einsum, "np,np->n", dtype=np.float64)
    lengths = np.sqrt(dot(image_embeds, image_embeds) * dot(text_embeds, text_embeds))
    return 100 * np.maximum(dot(image_embeds, text_embeds) / lengths, 0)


def prepare(case: Case) -> np.ndarray:
    """The embeddings f[n, P] of the prompts of those images that are in the subset."""
    rows = one_pass.numbers(case.images.count, case.settings.subset)
    return text_embeds(case.networks["clip"].where, [case.images.prompts[i] for i in rows])


def figures(case: Case, network: str) -> dict[str, Any]:
    scores = score(case.seen.rows["subset", network, "features"], case.prepared["clip"])
    return {"clip_score": float(scores.mean())}


METRIC = Metric(
    names=("clip",),
    of=GENERATED,
    help="CLIP score of images and their prompts",
    figures=figures,
    gives=lambda network: (Figure("clip_score", higher=True),),
    networks=("clip",),
    takes=(("subset", "features"),),
    needs=(PROMPTS,),
    prepare=prepare,
)
