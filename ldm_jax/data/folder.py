"""Images in a folder: class folders, `metadata.jsonl` or `.csv`, or `dataset.json` (see layout.py)."""

from ldm_jax.data.archive import Folder, resolve
from ldm_jax.data.files import Files
from ldm_jax.data.layout import Splits


def folder(
    split: str = "train",
    *,
    path: str,
    val_from_train: int = 0,
    num_classes: int | None = None,
    text_key: str = "",
    splits: Splits = None,
    skip_broken: bool = False,
) -> Files:
    """The images of `split` under the folder `path` (as it stands, or inside $LDM_DATA).

    Args:
        split: 'train', 'val', 'test', or any name that the metadata gives.
        path: the folder.
        val_from_train: k > 0 makes 'val' of the last k training images of each class, by file name.
        num_classes: how many classes there are; a label beyond them raises. Default: as many as the data has.
        text_key: the captions' key in the metadata; default: 'text', or the only other common name in it.
        splits: {split: folder or folders}, where the folders' names do not say it; {}: no folder is a split.
        skip_broken: leave out and count images that cannot be decoded, at construction.

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
        splits=splits,
        skip_broken=skip_broken,
    )
