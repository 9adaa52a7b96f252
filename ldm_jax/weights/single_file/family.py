"""The types that describe a family of single files. A family is one file of this folder and one line of FAMILIES."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ldm_jax.weights.single_file.measure import Shapes
from ldm_jax.weights.single_file.pairs import Pair

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Part(NamedTuple):
    """A network in the file.

    prefixes  prefixes of its names: the first is written, all are read
    mark      a tensor that it always has, without the prefix
    table     its config.json -> its pairs, without the prefix
    config    (shapes of its tensors without the prefix, pixels a side) -> its config.json
    spelt     a name in the file -> its spelling in the table, for files with other spellings
    filed     a name in the folder -> its spelling in the table, likewise
    """

    prefixes: tuple[str, ...]
    mark: str
    table: Callable[[Mapping[str, Any]], tuple[Pair, ...]]
    config: Callable[[Shapes, int], dict[str, Any]]
    spelt: Callable[[str], str] = lambda name: name
    filed: Callable[[str], str] = lambda name: name

    def prefix(self, names: Collection[str]) -> str | None:
        """The prefix that the network has among these names; None: it is not there."""
        return next((prefix for prefix in self.prefixes if prefix + self.mark in names), None)


class Kind(NamedTuple):
    """One kind of file of a family.

    family      its name in FAMILIES
    context     width of the states of the text that the denoiser attends to; None: it attends to no text
    channels    number of channels that the denoiser reads; more than a latent has where it also takes a mask or an image
    scheduler   options of scheduler_config.json that depend on the kind
    prediction  what the published denoiser predicts, one of PREDICTIONS
    """

    family: str
    context: int | None
    channels: int
    scheduler: Mapping[str, Any]
    prediction: str = "epsilon"


class Family(NamedTuple):
    """The kinds of file of one release.

    mark        a tensor by which such a file is recognised, as it is named there
    kinds       name -> Kind
    parts       component of the folder -> Part
    recognises  shapes of all tensors -> the name of the kind, or None
    size        (kind, prediction) -> pixels a side of the images that the published model was trained on
    scheduler   (shapes of all tensors, kind, prediction) -> scheduler_config.json, or None where the file holds no denoiser
    suits       component -> config.json -> the kind of file that these networks make, or None
    """

    mark: str
    kinds: Mapping[str, Kind]
    parts: Mapping[str, Part]
    recognises: Callable[[Shapes], str | None]
    size: Callable[[str, str], int]
    scheduler: Callable[[Shapes, Kind, str], dict[str, Any] | None]
    suits: Callable[[Mapping[str, Mapping[str, Any]]], str | None]
