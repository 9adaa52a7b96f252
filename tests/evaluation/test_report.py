"""The page is one file that fetches nothing, says what it was given, and escapes it."""

import base64
import html.parser
import re

import numpy as np
import pytest

from ldm_jax.data import contact_sheet
from ldm_jax.evaluation import report

STEPS = np.arange(200)


class Page(html.parser.HTMLParser):
    """Tags and text, and a check that every tag is closed by its own."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    picture = contact_sheet.save(folder / "samples.png", images, 2)
    loss = np.exp(-STEPS / 50) + 0.01
    loss[3] = np.nan
    path = report.write_report(
        folder / "out" / "report.html",
        "A <run>",
        curves=[("train/loss", STEPS, loss), ("val/loss", [7], [0.25])],
        grids=[("Samples", picture, 'note "quoted" & more')],
        table=[("accuracy", 0.123456, "of 200"), ("images", 1234567, ""), ("fid", None, "<none>")],
        commands=[("Go on", "ldm sample --text='<a>' && echo")],
        environment={"commit": "abc123"},
        summary="<script>alert(1)</script>",
    )
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path, picture, Page(path.read_text(encoding="utf-8"))


def test_says_what_it_was_given(written):
    path, picture, page = written
    text = " ".join(page.words)
    for words in ("A <run>", "0.1235", "1,234,567", "<none>", 'note "quoted" & more', "abc123"):
        assert words in text
    assert "ldm sample --text='<a>' && echo" in page.words
    source = path.read_text(encoding="utf-8")
    assert source.count("<!-- images -->") == 2 and "<!-- step -->" not in source  # the axis of the curves
    assert base64.b64encode(picture.read_bytes()).decode() in source


def test_is_self_contained(written):
    path, _, page = written
    kinds = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(kinds)
    assert kinds.count("svg") == 2 and kinds.count("img") == 1
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    assert not re.search(r"@import|url\((?!#)", path.read_text(encoding="utf-8"))
    # Ids are unique in the page, and what refers to one finds it.
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    assert references and references <= set(ids)


def test_table_of_dicts():
    page = Page(report.figures([{"class": "cat", "accuracy": 0.5}, {"class": "<dog>", "images": 3}]))
    assert page.words == ["class", "accuracy", "images", "cat", "0.5", "-", "<dog>", "-", "3"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"curve 'loss': \(3,\) images and \(2,\) values"):
        report.write_report(tmp_path / "a.html", "t", curves=[("loss", [1, 2, 3], [1, 2])])
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / "a.html", "t", grids=[("g", tmp_path / "none.png", "")])
    with pytest.raises(ValueError, match="expected a PNG"):
        report.write_report(tmp_path / "a.html", "t", grids=[("g", tmp_path / "none.exe", "")])
    assert list(tmp_path.iterdir()) == []
    report.write_report(tmp_path / "empty.html", "t", curves=[("loss", [], []), ("nan", [1], [np.nan])])
