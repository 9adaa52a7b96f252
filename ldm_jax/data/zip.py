"""Images in a zip file: class folders, `metadata.jsonl` or `.csv`, or `dataset.json` (see layout.py), read without unpacking."""

from ldm_jax.data.archive import Zip, resolve
from ldm_jax.data.files import Files
from ldm_jax.data.layout import Splits


def zip_file(
    split: str = "train",
    *,
    path: str,
    val_from_train: int = 0,
    num_classes: int | None = None,
    text_key: str = "",
    splits: Splits = None,
    skip_broken: bool = False,
) -> Files:
    """The images of `split` in the zip file `path` (as it stands, or inside $LDM_DATA); arguments as for `folder`.

    CIFAR-10's validation split by this project's convention is `val_from_train=500`: train/<class>/4500 to 4999.
    Raises FileNotFoundError or ValueError with the name of the file that is wrong.
    """
    where = resolve(path)
    if where.is_dir():
        raise ValueError(f"{where}: a folder, not a zip file; it is read with name='folder'")
    return Files(
        Zip(where),
        split,
        val_from_train=val_from_train,
        num_classes=num_classes,
        text_key=text_key,
        splits=splits,
        skip_broken=skip_broken,
    )
