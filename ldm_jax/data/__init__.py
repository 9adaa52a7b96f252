"""Data: random-access sources of images, and the one pipeline that turns them into batches.

A source has `len(source)`, `source[i] -> {'image': u8[H, W, 3], 'label': i32[], 'text': str}` (`latents`: 'mean' and
'std' in the place of 'image'), and the attributes `name`, `num_classes` (0 = unlabelled), `class_names`, `has_text`;
`where(i)` names item i for error messages, `fingerprint()` is a sha256 of the content. A source is built as
`SOURCES[name](split='train', **block)`.

Data that is no image has an entry of its own in the place of 'image', such as 'video' u8[T, H, W, 3] or 'signal' f32[N, C]
(config.input.entry); it is handed on as it is.

A source may say more. An item with several captions has them as 'captions', a tuple, and its source has `several_captions`. `captions`
holds those of all images, `split_sizes` counts the images of every split, `left_out` counts by kind the files that are there and are
not read, `skipped` counts the broken images that are left out, `origin` says where all this comes from.
"""

from ldm_jax.data import cifar10, folder, latent_cache, shapes, tfds
from ldm_jax.data import zip as zip_
from ldm_jax.data.pipeline import eval_batches, train_batches
from ldm_jax.data.tokenize import TOKENIZERS, Tokenizer

SOURCES = {
    "shapes": shapes.shapes,
    "folder": folder.folder,
    "zip": zip_.zip_file,
    "tfds": tfds.tfds,
    "cifar10": cifar10.cifar10,
    "latents": latent_cache.latents,
}

__all__ = ["SOURCES", "TOKENIZERS", "Tokenizer", "eval_batches", "train_batches"]
