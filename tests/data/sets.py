"""Small data sets on disk."""

import io
import pathlib
import zipfile

from PIL import Image

Files = dict[str, bytes | str]


def png(value: int, size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    """A grey picture of one value."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, kind)
    return file.getvalue()


def write(folder: pathlib.Path, files: Files) -> str:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(folder)


def zipped(path: pathlib.Path, files: Files, compression: int = zipfile.ZIP_STORED) -> str:
    """A zip file whose members have exactly these names, with Windows's separators where they have them."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, compression
            file.writestr(info, data)
    return str(path)
