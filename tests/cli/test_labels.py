"""--label by number, name and synonym, with commas inside names."""

import pytest

from ldm_jax.cli.labels import read

NAMES = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    2: "golden retriever",
    3: "crane",
    4: "crane",
    5: "maillot",
    6: "maillot, tank suit",
    7: "2",
}


@pytest.mark.parametrize(
    "text, labels",
    [
        ("", []),
        ("golden retriever", [2]),
        ("Golden  Retriever,3", [2, 3]),
        ("tench, Tinca tinca", [0]),
        ("tench,Tinca tinca,goldfish", [0, 1]),
        ("tinca tinca,tench", [0, 0]),
        ("maillot,tank suit", [6]),
        ("maillot,0", [5, 0]),
        ("2,1", [7, 1]),
    ],
)
def test_names_and_numbers(text, labels):
    assert read(text, NAMES, 8) == labels


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "golden retreiver",
            "--label=golden retreiver is no class; expected 0 to 7 or a name, such as 'golden retriever'",
        ),
        ("1,8", "--label=8 is no class; expected 0 to 7$"),
        ("-1", "--label=-1 is no class; expected 0 to 7$"),
        ("crane", r"--label=crane names several classes: 3 \(crane\), 4 \(crane\); expected a number"),
    ],
)
def test_what_is_no_class(text, said):
    with pytest.raises(ValueError, match=said):
        read(text, NAMES, 8)
    with pytest.raises(ValueError, match=r"x is no class; expected 0 to 7$"):
        read("x", {}, 8)
