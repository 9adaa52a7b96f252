"""Images in a folder: class folders, `metadata.jsonl` or `dataset.json` (see layout.py)."""

from ldm_jax.data.archive import Folder, resolve
from ldm_jax.data.files import Files


def folder(
    split: str = "train",
    *,
    path: str,
    val_from_train: int = 0,
    num_classes: int | None = None,
    text_key: str = "text",
    skip_broken: bool = False,
) -> Files:
    """The images of `split` under the folder `path` (as it stands, or inside $LDM_DATA).

    Args:
        split: 'train', 'val', 'test', or any name that the metadata gives.
        path: the folder.
        val_from_train: k > 0 makes 'val' of the last k training images of each class, by file name.
        num_classes: declares the classes; a label beyond them raises. Default: as many as are found.
        text_key: the caption's key in metadata.jsonl.
        skip_broken: leave out images that cannot be decoded, counted, at construction.

    Raises FileNotFoundError or ValueError with the name of the file that is wrong.
    """
    where = resolve(path)
    if not where.is_dir():
        raise ValueError(f"{where}: not a folder; a zip file is read with name='zip'")
    return Files(
        Folder(where),
        split,
        val_from_train=val_from_train,
        num_classes=num_classes,
        text_key=text_key,
        skip_broken=skip_broken,
    )
