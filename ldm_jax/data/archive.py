"""One way to read a folder and a zip: a list of member names, and `read(name) -> bytes`.

A zip is read by offset (one `pread` a member, no shared file position), so that any number of threads may read at once. An archive can
be pickled: the process that unpickles it opens the file again. Names that lead out of the archive are refused.
"""

import collections
import os
import pathlib
import re
import struct
import threading
import zipfile
import zlib

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
SYSTEM = {"__macosx", "icon\r", "lost+found", "__pycache__"}  # what macOS, Linux and Python leave
SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "system volume information", "$recycle.bin"}  # Windows
SYSTEM |= {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"}  # Synology and QNAP
READ_ALREADY = "links to folders that are read already"


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    """What is the same for all names of a folder, and differs between folders."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """An existing path: `path` itself (absolute, or relative to the working directory), else inside $LDM_DATA.

    Raises FileNotFoundError that says where it looked.
    """
    place = pathlib.Path(path).expanduser()
    tried = [place.absolute()]
    home = os.environ.get("LDM_DATA", "")
    if home and not place.is_absolute():
        tried.append(pathlib.Path(home).expanduser().absolute() / place)
    for candidate in tried:
        if candidate.exists():
            return candidate
    hint = "" if home or place.is_absolute() else " (LDM_DATA is unset: it can name the folder of data sets)"
    raise FileNotFoundError(f"no data at '{path}': looked for {' and '.join(map(str, tried))}{hint}")


def check_name(name: str, where: str) -> str:
    """`name` unchanged if it is a relative path that stays inside its archive; raises ValueError otherwise.

    A ':' is allowed (screenshots have the time in their names), except after the letter of a Windows drive.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or DRIVE.match(name) or "\0" in name:
        raise ValueError(f"{where}: the path '{name}' leads out of the data set; expected a relative path without '..'")
    return name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set, because it is hidden or belongs to the system."""
    return name.startswith(".") or name.lower() in SYSTEM


class Folder:
    """The files under `path` without hidden and system files; `names` is sorted, with '/' between the parts.

    Links are followed, but a folder is read once: a link to a folder that is read already, or lies above `path`, is counted in
    `left_out`. Raises OSError for a folder that cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.left_out: dict[str, int] = {}
        names: list[str] = []
        seen: set[tuple[int, int]] = set()
        above = {_identity(folder) for folder in path.resolve().parents}
        # Real folders come before links, so that a file has the name under which it really lies.
        folders, links = [(str(path), "")], collections.deque()
        while folders or links:
            is_link = not folders
            folder, prefix = links.popleft() if is_link else folders.pop()
            if _identity(folder) in (seen | above if is_link else seen):
                self.left_out[READ_ALREADY] = self.left_out.get(READ_ALREADY, 0) + 1
                continue
            seen.add(_identity(folder))
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    (links if entry.is_symlink() else folders).append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_symlink() or entry.is_file():  # a broken link is named when it is read; a pipe would wait
                    names.append(prefix + entry.name)
        self.names = tuple(sorted(names))

    def where(self, name: str) -> str:
        return str(self.path / name)

    def stamp(self, name: str) -> str:
        """Changes when the file does."""
        stat = (self.path / name).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """The members of the zip file `path`, stored or deflated, without hidden and system files; `names` is sorted.

    Raises ValueError for a file that is no zip, for an encrypted member, and for a name that leads out of the archive.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.left_out: dict[str, int] = {}
        try:
            with zipfile.ZipFile(path) as file:
                infos = [i for i in file.infolist() if not i.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path}: cannot be read as a zip file ({error})") from error
        self._members = {}
        for info in infos:
            name = check_name(info.filename, str(path)).replace("\\", "/")  # Windows writes backslashes
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.endswith("/") or any(map(is_hidden, parts)):
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path}: member '{info.filename}' is neither stored nor deflated (or is encrypted)")
            self._members["/".join(parts)] = (info.header_offset, info.compress_size, info.compress_type, info.CRC)
        self.names = tuple(sorted(self._members))
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._file = open(self.path, "rb")

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def _pread(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, offset)
        with self._lock:  # Windows has no pread
            self._file.seek(offset)
            return self._file.read(size)

    def where(self, name: str) -> str:
        return f"{self.path}:{name}"

    def stamp(self, name: str) -> str:
        """Changes when the member does."""
        _, size, _, crc = self._members[name]
        return f"{size} {crc}"

    def read(self, name: str) -> bytes:
        offset, size, kind, crc = self._members[name]
        header = self._pread(LOCAL_HEADER.size, offset)
        if len(header) != LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise ValueError(f"{self.where(name)}: no member starts at byte {offset}; the archive is damaged")
        *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        data = self._pread(size, offset + LOCAL_HEADER.size + name_length + extra_length)
        try:
            data = zlib.decompress(data, -15) if kind == zipfile.ZIP_DEFLATED else data
        except zlib.error as error:
            raise ValueError(f"{self.where(name)}: {error}; the archive is damaged") from error
        if zlib.crc32(data) != crc:
            raise ValueError(f"{self.where(name)}: its checksum does not match; the archive is damaged")
        return data
