"""From a flat torch state dict to a nested tree of parameters, by rules of layout alone; pure numpy.

    weight[O, I, kh, kw] -> kernel[kh, kw, I, O]     weight[O, I] -> kernel[I, O]     weight[C] -> scale[C]
    `a.0.b` -> `a_0 / b`: an index belongs to the list before it

What a model names differently stands in a table of its own, (pattern, replacement) pairs applied in order to the torch name.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

Table = Sequence[tuple[str, str]]


def rename(name: str, table: Table) -> str:
    """The path of our parameter, joined by '/', for the torch name without its last part ('weight' or 'bias')."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).replace(".", "/")


def to_params(
    state: Mapping[str, np.ndarray], table: Table, embeddings: Sequence[str] = (), dense: Sequence[str] = ()
) -> dict:
    """A nested dict of parameters from `state`.

    `embeddings` are the torch modules whose weight is a lookup table, `dense` the last path parts whose 1 x 1 convolution is
    a dense layer here. Raises ValueError on a name that ends in neither 'weight' nor 'bias'.
    """
    params: dict = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or not module:
            raise ValueError(f"weight {name!r} ends in {leaf!r}: expected 'weight' or 'bias'")
        path = rename(module, table).split("/")
        value = np.asarray(value)
        if leaf == "weight" and module in embeddings:
            leaf = "embedding"
        elif leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "kernel"
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            if value.ndim == 4 and path[-1] in dense:
                value = value[0, 0]
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return params


def stack_layers(params: dict, name: str) -> dict:
    """Replace subtrees `name_0`, `name_1`, ... by one subtree `name` with a leading layer axis, wherever they are."""
    numbered = sorted((k for k in params if re.fullmatch(rf"{name}_\d+", k)), key=lambda k: int(k.rpartition("_")[2]))

    def stack(layers: list) -> dict | np.ndarray:
        if isinstance(layers[0], dict):
            return {key: stack([layer[key] for layer in layers]) for key in layers[0]}
        return np.stack(layers)

    rest = {k: stack_layers(v, name) if isinstance(v, dict) else v for k, v in params.items() if k not in numbered}
    if len(numbered) == 1:
        rest[numbered[0]] = params[numbered[0]]
    elif numbered:
        rest[name] = stack([params[k] for k in numbered])
    return rest
