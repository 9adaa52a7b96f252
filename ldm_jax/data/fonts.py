"""A font that has the characters of a caption: Pillow's (little but ASCII), matplotlib's DejaVu Sans, else one of the system's.

A character that no font has is written as an escape, \\u4e2d, and one warning says so. Where Pillow has libfribidi, Arabic letters are
joined and lines of a right-to-left script are reversed.
"""

import functools
import io
import pathlib
import unicodedata
import warnings

from PIL import ImageFont

# Where systems keep fonts. Large files have most characters: of thousands of files the few largest are looked into.
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
LARGEST = 20
PILLOW = ""  # the font in Pillow, which is no file
_said: set[str] = set()  # the character that the warning named, after it was given


def fitting(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """(`text` as it can be drawn, the font of `size` pixels that has most of its characters). Never fails."""
    if text.isascii() and text.isprintable():
        return text, ImageFont.load_default(size=size)
    drawn = {ord(c) for c in text if not _unseen(c)}
    best, lacking = PILLOW, drawn
    for path in _paths():
        missing = drawn - _characters(path)
        if len(missing) < len(lacking) and _open(path, size) is not None:
            best, lacking = path, missing
        if not lacking:
            break
    if lacking:
        _warn(chr(min(lacking)))
    has = _characters(best)
    return "".join(_spelt(c, ord(c) in lacking, ord(c) in has) for c in text), _open(best, size)


def _unseen(c: str) -> bool:
    """Whether it is a blank, or only says how other characters are drawn: joiners, directions, variation selectors."""
    return c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or 0xFE00 <= ord(c) <= 0xFE0F


def _spelt(c: str, lacking: bool, has: bool) -> str:
    if lacking:
        return c.encode("unicode_escape").decode()
    return c if has or c.isspace() else ""


def _warn(c: str) -> None:
    """Once in a process."""
    if _said:
        return
    _said.add(c)
    name = unicodedata.name(c, "a character without a name")
    warnings.warn(
        f"captions hold characters that no font here has, such as U+{ord(c):04X} ({name}): pictures show them as "
        f"{_spelt(c, True, False)}. A font with them, such as Noto Sans CJK, helps once it is installed",
        stacklevel=3,
    )


@functools.cache
def _paths() -> tuple[str, ...]:
    import matplotlib

    files = []
    for folder in FOLDERS:
        root = pathlib.Path(folder).expanduser()
        # One of macOS has a box for every character.
        fonts = (path for path in root.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc") and path.is_file())
        files += [path for path in fonts if not path.name.startswith("LastResort")]
    files = sorted(files, key=lambda path: (-path.stat().st_size, str(path)))[:LARGEST]
    return PILLOW, str(pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), *map(str, files)


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """The code points that a font has; none for a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        file = io.BytesIO(ImageFont.load_default(size=10).path.getvalue()) if path == PILLOW else path
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.lru_cache(64)
def _open(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The font; None for one that does not have this size, such as coloured emoji."""
    if path == PILLOW:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None
