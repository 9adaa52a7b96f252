"""The rows of metadata.jsonl, metadata.csv and metadata.tsv (Hugging Face's imagefolder), one an image, with their line numbers."""

import csv
import io
import json
import unicodedata
from typing import Any, NamedTuple

from ldm_jax.data import captions, splits
from ldm_jax.data.archive import Folder, Zip, check_name

FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
NOT_READ = ("metadata.parquet",)


class Row(NamedTuple):
    """The row of an image: the path of its file, the values by key, and `where` the row stands, for messages."""

    name: str
    values: dict[str, Any]
    where: str


def files(archive: Folder | Zip) -> list[str]:
    """The metadata files of an archive. Raises ValueError for two in one folder, and for one of a kind that is not read."""
    there = [n for n in archive.names if n.rpartition("/")[2] in (*FILES, *NOT_READ)]
    for name in there:
        if name.rpartition("/")[2] in NOT_READ:
            raise ValueError(f"{archive.where(name)}: cannot be read; expected {', '.join(FILES)}")
    bases: dict[str, str] = {}
    for name in there:
        other = bases.setdefault(name.rpartition("/")[0], name)
        if other != name:
            raise ValueError(
                f"{archive.where(name)}: there is {other.rpartition('/')[2]} beside it; expected one of them"
            )
    return there


def rows(archive: Folder | Zip, file: str) -> list[Row]:
    """The rows of one file. Raises ValueError that names the line which cannot be read."""
    text = captions.as_text(archive.read(file), archive.where(file))
    lines = _jsonl if file.endswith(".jsonl") else _table
    base, members, plain = file[: len(file) - len(file.rpartition("/")[2])], set(archive.names), {}
    out = []
    for number, values in lines(text, archive.where(file), "\t" if file.endswith(".tsv") else ","):
        where = f"{archive.where(file)}:{number}"
        if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
            keys = f"; met {', '.join(map(str, values))[:120]}" if isinstance(values, dict) else ""
            raise ValueError(f"{where}: expected an object with a file_name{keys}")
        name = base + check_name(values["file_name"], where)
        if name not in members:
            plain = plain or {_plain(member): member for member in archive.names}
            if _plain(name) not in plain:
                raise ValueError(f"{where}: '{name}' is listed but not there")
            name = plain[_plain(name)]
        out.append(Row(name, values, where))
    labels = [row.values.get("label") for row in out]
    if lines is _table and all(v is None or v.strip().isdecimal() for v in labels):  # all cells of a table are text
        out = [row._replace(values={**row.values, "label": v and int(v)}) for row, v in zip(out, labels)]
    return out


def _plain(name: str) -> str:
    """A path in one spelling: Windows has other separators, macOS splits letters and their accents."""
    parts = [part for part in unicodedata.normalize("NFC", name).replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts)


def _jsonl(text: str, where: str, _: str):
    # splitlines() would also split at U+2028 and its like, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}:{number}: not valid JSON ({error})") from error


def _table(text: str, where: str, delimiter: str):
    """The rows of a table, an empty cell as None."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = cells
                twice = next((c for c in cells if cells.count(c) > 1), None)
                if "file_name" not in cells or twice is not None:
                    met = f"'{twice}' twice" if twice is not None else ", ".join(cells)[:120]
                    raise ValueError(f"{where}:1: expected a header with file_name and no name twice; met {met}")
            elif len(cells) != len(header):
                raise ValueError(f"{where}:{reader.line_num}: {len(cells)} cells; the header has {len(header)}")
            else:
                yield reader.line_num, {k: v if v.strip() else None for k, v in zip(header, cells)}
    except csv.Error as error:
        raise ValueError(f"{where}:{reader.line_num}: not a table ({error})") from error


def split_values(rows: list[Row], ignore: str | None) -> list[str] | None:
    """The value of `split` of each row; None where no row has one.

    Raises ValueError for a value that is not text, for one row without a value among others, and for splits under another key.
    """
    values = [row.values.get("split") for row in rows]
    wrong = next((row for row, v in zip(rows, values) if v is not None and not isinstance(v, str)), None)
    if wrong is not None:
        raise ValueError(f"{wrong.where}: the split {wrong.values['split']!r:.80} is not text")
    missing = [row for row, v in zip(rows, values) if not (v or "").strip()]
    if missing and len(missing) < len(rows):
        raise ValueError(f"{missing[0].where}: '{missing[0].name}' has no split while others have one")
    if not missing:
        return [v.strip() for v in values]
    for key in rows[0].values if rows else ():
        if key in ("file_name", "split", ignore):
            continue
        kinds = {str(row.values.get(key))[:40] for row in rows} if len(rows) > 1 else set()
        if 1 < len(kinds) < 20 and all(splits.canonical(k) in ("train", "val", "test") for k in kinds):
            raise ValueError(
                f"{rows[0].where}: '{key}' names splits ({', '.join(sorted(kinds))}); expected the key 'split'"
            )
    return None
