"""A file of prompts: one a line, whatever editor wrote it."""

from types import SimpleNamespace

import pytest

from ldm_jax.evaluation import prompt_list

RUN = SimpleNamespace(model=SimpleNamespace(conditioning=SimpleNamespace(takes=frozenset({"prompts"}))))


@pytest.mark.parametrize(
    "data, lines",
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\r\n\r\n  \r\na dog", ["a cat", "a dog"]),
        ("a\u2028cat\x85\x0c\x1cof é\na dog".encode(), ["a\u2028cat\x85\x0c\x1cof é", "a dog"]),
        ("a cat\r\na dog\r\n".encode("utf-16"), ["a cat", "a dog"]),
    ],
    ids=["plain", "byte order mark", "separators", "utf-16"],
)
def test_lines_are_prompts(tmp_path, data, lines):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert prompt_list.read(RUN, str(path), 3) == [*lines, lines[0]]


@pytest.mark.parametrize(
    "data, said",
    [(b"a\n\n\xe9t\xe9\n", r"prompts.txt:3: not UTF-8 \(byte 0xe9\)"), (b"\n \r\n", "holds no line with a prompt")],
)
def test_what_is_no_text_is_named(tmp_path, data, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"--prompts=.*{said}"):
        prompt_list.read(RUN, str(path), 3)
