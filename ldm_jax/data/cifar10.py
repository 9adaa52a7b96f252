"""CIFAR-10 (Krizhevsky, 2009) from its official archive, prepared for TFDS without TensorFlow.

    python -m ldm_jax.data.cifar10 cifar-10-python.tar.gz --out DIR

writes DIR/cifar10/3.0.2 as array_record under the official name, version and features, so that both the source here and
`tfds.data_source('cifar10', data_dir=DIR)` read it. The archive's MD5 is the one that its page publishes
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import argparse
import hashlib
import io
import logging
import pathlib
import pickle
import sys
import tarfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ldm_jax.data.tfds import Tfds, tfds

MD5 = "c58f30108f718f92721af3b95e74349a"
VERSION = "3.0.2"
VAL_PER_CLASS = 500
TRAIN = tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6))
TEST = ("cifar-10-batches-py/test_batch",)
META = "cifar-10-batches-py/batches.meta"


def cifar10(split: str = "train", *, data_dir: str | None = None, val_per_class: int = VAL_PER_CLASS) -> Tfds:
    """CIFAR-10 as `prepare` (or TFDS) wrote it: 'train' 45,000, 'val' the last 500 of each class, 'test' 10,000.

    Raises ValueError if `data_dir` does not hold it.
    """
    return tfds(split, dataset="cifar10", data_dir=data_dir, val_from_train=val_per_class)


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers alone: anything else that a pickle names is code, which would be executed."""

    ALLOWED = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"the pickle asks for {module}.{name}, which no CIFAR-10 file holds")
        module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def _unpickle(data: bytes, where: str) -> dict[str, object]:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"{where}: cannot be read as CIFAR-10 ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: holds a {type(content).__name__}, expected a dict")
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}


def _batch(content: dict, where: str) -> tuple[np.ndarray, list[int]]:
    data, labels = content.get("data"), content.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{where}: 'data' is not u8[N, 3072]")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise ValueError(f"{where}: 'labels' is not a list of {len(data)}")
    wrong = [v for v in labels if not isinstance(v, int) or not 0 <= v < 10]
    if wrong:
        raise ValueError(f"{where}: label {wrong[0]!r} is out of range; expected 0..9")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _examples(members: dict[str, bytes], names: tuple[str, ...], prefix: str, where: str) -> Iterator[tuple[int, dict]]:
    index = 0
    for name in names:
        images, labels = _batch(_unpickle(members[name], f"{where}:{name}"), f"{where}:{name}")
        for image, label in zip(images, labels):
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(png, "PNG")
            yield index, {"id": f"{prefix}_{index:05d}", "image": png.getvalue(), "label": label}
            index += 1


def prepare(archive: str, out: str, md5: str = MD5) -> pathlib.Path:
    """Writes OUT/cifar10/3.0.2 from the official `cifar-10-python.tar.gz`; returns that folder.

    Raises ValueError if the archive's MD5 is not `md5`, or its content is not CIFAR-10's. A folder that exists already stays as it is.
    """
    source = pathlib.Path(archive)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5:
        raise ValueError(f"{source}: its MD5 is {digest}; expected {md5}: damaged, or another archive")
    names = (*TRAIN, *TEST, META)
    try:
        with tarfile.open(source) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and m.name in names}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{source}: cannot be read as a tar archive ({error})") from error
    missing = [n for n in names if n not in members]
    if missing:
        raise ValueError(f"{source}: '{missing[0]}' is not in it")
    class_names = _unpickle(members[META], f"{source}:{META}").get("label_names")
    if not isinstance(class_names, list) or len(class_names) != 10:
        raise ValueError(f"{source}:{META}: 'label_names' is not a list of 10")
    for name in (*TRAIN, *TEST):  # before anything is written
        _batch(_unpickle(members[name], f"{source}:{name}"), f"{source}:{name}")

    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets

    # Not registered: TFDS has a builder of this name, which reads what this one writes.
    with tensorflow_datasets.core.registered.skip_registration():

        class Cifar10(tensorflow_datasets.core.GeneratorBasedBuilder):
            name = "cifar10"
            VERSION = tensorflow_datasets.core.Version(VERSION)
            pkg_dir_path = None

            def _info(self):
                features = {
                    "id": tensorflow_datasets.features.Text(),
                    "image": tensorflow_datasets.features.Image(shape=(32, 32, 3)),
                    "label": tensorflow_datasets.features.ClassLabel(names=class_names),
                }
                return tensorflow_datasets.core.DatasetInfo(
                    builder=self,
                    features=tensorflow_datasets.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": _examples(members, TRAIN, "train", str(source)),
                    "test": _examples(members, TEST, "test", str(source)),
                }

            def _generate_examples(self):
                raise AssertionError("the splits are generated in _split_generators")

    builder = Cifar10(data_dir=str(pathlib.Path(out).absolute()), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm_jax.data.cifar10", description="Prepare CIFAR-10 for TFDS.")
    parser.add_argument("archive", help="the official cifar-10-python.tar.gz")
    parser.add_argument("--out", required=True, help="data_dir to write to; the data set comes to OUT/cifar10/3.0.2")
    parser.add_argument("--md5", default=MD5, help="expected MD5 of the archive (default: the published one)")
    options = parser.parse_args(arguments)
    try:
        print(prepare(options.archive, options.out, options.md5))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
