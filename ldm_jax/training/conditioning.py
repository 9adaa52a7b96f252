"""What a denoiser is conditioned on: what a condition is, and several of them at once.

    value = read(frozen, batch, keys)      value_i <- null where row i is dropped      cond |= encode(params, frozen, value)

Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598, alg. 1) trains one network with and without its conditions: a dropped
row has the null in the place of its value. `task.drop` drops all conditions of a row together; a condition that has a probability of
its own is dropped by itself. When images are drawn, guidance goes away from the null of every condition that was ever dropped, and
keeps the others: the mask of inpainting, the small picture of super-resolution.

training/conditions has a file a condition and the table of them.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import models

Batch = Mapping[str, jax.Array]
Entries = dict[str, jax.Array]
Values = dict[str, Any]

# The axis along which an entry that several conditions give is joined; any other entry has one giver.
JOINED = {"text": 1, "text_mask": 1, "channels": -1}


class Condition(NamedTuple):
    """One condition. `value` is a tree of arrays with leading axis B; `frozen` is what the task hands to its compiled functions.

    name     its name in config.condition
    read     (frozen, batch, keys key[B]) -> value; nothing that is trained takes part. Row i depends on row i and keys[i] alone
    encode   (params, frozen, value) -> entries of cond, f32[B, ...]; an entry 'channels' is joined to the channels of x_t
    null     the value of one row that is dropped: the tree of `read` without its first axis
    needs    entries of the batch that `read` reads: 'label', 'tokens', 'image', or another one of the data source
    takes    what `ldm generate` needs: 'prompts', 'labels', 'image', 'mask'
    init     key -> params that are trained beside the denoiser, in TrainState.params under its name; None: it has none
    frozen   its parameters that nobody trains; they are frozen[name]. None: it has none
    facts    {key of its block: sha256} of what no checkpoint holds
    drawn    `read` of drawing, where it is another one (nothing is augmented there)
    show     value -> f32[B, H, W, 3] in [-1, 1], a picture of it for grids
    reduces  how many times smaller the condition is than the picture 'image' that it is made of
    drop     the probability of a row to be dropped by itself; None: config.task.drop decides, for all such conditions together
    """

    name: str
    read: Callable[[Any, Batch, jax.Array], Any]
    encode: Callable[[Any, Any, Any], Entries]
    null: Any
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    init: Callable[[jax.Array], Any] | None = None
    frozen: Any = None
    facts: Mapping[str, str] = {}
    drawn: Callable[[Any, Batch, jax.Array], Any] | None = None
    show: Callable[[Any], jax.Array] | None = None
    reduces: int = 1
    drop: float | None = None


class Conditioning(NamedTuple):
    """The conditions of a network, in the order of CONDITIONS. `num_classes`: of the labels that one of them takes; 0: none does."""

    conditions: tuple[Condition, ...] = ()
    num_classes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the conditions."""
        return tuple(condition.name for condition in self.conditions)

    @property
    def takes(self) -> frozenset[str]:
        """What `ldm generate` needs, of all conditions."""
        return frozenset(name for condition in self.conditions for name in condition.takes)

    @property
    def needs(self) -> frozenset[str]:
        """Entries of the batch that are read, of all conditions."""
        return frozenset(name for condition in self.conditions for name in condition.needs)

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of the conditions that words and numbers cannot say: they are read from rows of data."""
        said = {"label", "tokens"}
        return tuple(condition.name for condition in self.conditions if not said.issuperset(condition.needs))


def number(name: str) -> int:
    """What is folded into a key for the condition of this name: another condition moves none of its draws."""
    return zlib.crc32(name.encode())


def init(conditioning: Conditioning, key: jax.Array) -> dict[str, Any]:
    """The trained parameters of all conditions, by their names: {} where none is trained."""
    # The text encoder takes the key itself, as it did when there was no other.
    keys = {
        c.name: key if c.name == "text" else jax.random.fold_in(key, number(c.name)) for c in conditioning.conditions
    }
    return {c.name: c.init(keys[c.name]) for c in conditioning.conditions if c.init is not None}


def frozen(conditioning: Conditioning) -> dict[str, Any]:
    """The parameters that conditions read and nobody trains, by their names."""
    return {c.name: c.frozen for c in conditioning.conditions if c.frozen is not None}


def facts(conditioning: Conditioning) -> dict[str, str]:
    """{'condition.NAME.KEY': sha256} of what conditions depend on and no checkpoint holds."""
    return {f"condition.{c.name}.{key}": sha256 for c in conditioning.conditions for key, sha256 in c.facts.items()}


def conditional(conditioning: Conditioning) -> bool:
    """Whether there is something to guide away from: a condition that may be dropped."""
    return any(c.drop != 0.0 for c in conditioning.conditions)


# --- values --------------------------------------------------------------------------------------------------------------


def read(conditioning: Conditioning, frozen: Any, batch: Batch, keys: jax.Array, drawing: bool = False) -> Values:
    """{name: value} of a batch, by the keys [B] of its rows."""

    def of(c: Condition) -> Any:
        how = c.drawn if drawing and c.drawn is not None else c.read
        return how(frozen, batch, jax.vmap(lambda key: jax.random.fold_in(key, number(c.name)))(keys))

    return {c.name: of(c) for c in conditioning.conditions}


def drops(conditioning: Conditioning, key: jax.Array, together: float, rows: int) -> dict[str, jax.Array]:
    """{name: bool[rows]}, which rows are dropped: together with that probability, or by themselves."""
    joint = together and any(c.drop is None for c in conditioning.conditions)
    all_at_once = jax.random.bernoulli(key, together, (rows,)) if joint else None
    out = {}
    for c in conditioning.conditions:
        if c.drop is None and joint:
            out[c.name] = all_at_once
        elif c.drop:
            out[c.name] = jax.random.bernoulli(jax.random.fold_in(key, number(c.name)), c.drop, (rows,))
    return out


def dropped(conditioning: Conditioning, values: Values, drop: Mapping[str, jax.Array]) -> Values:
    """The values, with the null of a condition in the rows where its `drop` bool[B] is true."""

    def without(where: jax.Array) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda null, value: jnp.where(where.reshape(-1, *[1] * (value.ndim - 1)), null, value)

    nulls = {c.name: c.null for c in conditioning.conditions if c.name in drop}
    return values | {name: jax.tree.map(without(drop[name]), null, values[name]) for name, null in nulls.items()}


def away(conditioning: Conditioning, values: Values) -> Values:
    """What is guided away from: the null of every condition that may be dropped, and the value of any other.

    Raises ValueError for values of another size than the null, which is that of training.
    """

    def rows_of(c: Condition) -> Any:
        def fill(null: Any, value: jax.Array) -> jax.Array:
            if np.shape(null) != value.shape[1:]:
                raise ValueError(
                    f"the condition {c.name} is dropped in training with shape {np.shape(null)}, and has shape {value.shape[1:]} here; "
                    "expected the size of training"
                )
            return jnp.broadcast_to(jnp.asarray(null), value.shape)

        return jax.tree.map(fill, c.null, values[c.name])

    return {c.name: values[c.name] if c.drop == 0.0 else rows_of(c) for c in conditioning.conditions}


def nothing(conditioning: Conditioning, rows: int) -> Values:
    """The nulls of all conditions, of the size of training, for `rows` rows."""
    return {
        c.name: jax.tree.map(lambda null: jnp.broadcast_to(jnp.asarray(null), (rows, *np.shape(null))), c.null)
        for c in conditioning.conditions
    }


# --- entries of cond -----------------------------------------------------------------------------------------------------


def encode(conditioning: Conditioning, params: Mapping[str, Any], frozen: Any, values: Values) -> Entries:
    """`cond` of the denoiser. Entries of JOINED that several conditions give are joined, in the order of CONDITIONS."""
    each = [c.encode(params.get(c.name), frozen, values[c.name]) for c in conditioning.conditions]
    if sum("text" in entries for entries in each) > 1 and any("text_mask" in entries for entries in each):
        full = [{"text_mask": jnp.ones(e["text"].shape[:2], bool)} if "text" in e else {} for e in each]
        each = [more | entries for more, entries in zip(full, each)]
    parts: dict[str, list[jax.Array]] = {}
    for entries in each:
        for name, value in entries.items():
            parts.setdefault(name, []).append(value)
    return {
        name: arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, JOINED[name]) for name, arrays in parts.items()
    }


def training(
    conditioning: Conditioning,
    params: Mapping[str, Any],
    frozen: Any,
    batch: Batch,
    key: jax.Array,
    together: float,
    rows: int,
) -> Entries:
    """`cond` of a batch of `rows` rows in a step of training, whose key decides what is dropped and what is augmented."""
    keys = jax.random.split(jax.random.fold_in(key, number("rows")), rows)
    values = read(conditioning, frozen, batch, keys)
    return encode(conditioning, params, frozen, dropped(conditioning, values, drops(conditioning, key, together, rows)))


def complete(
    conditioning: Conditioning, params: Mapping[str, Any], frozen: Any, batch: Batch, keys: jax.Array
) -> Entries:
    """`cond` of a batch with nothing dropped, by the keys [B] of its rows: of validation, and of measuring."""
    return encode(conditioning, params, frozen, read(conditioning, frozen, batch, keys))


# --- what fits -----------------------------------------------------------------------------------------------------------


def entries(conditioning: Conditioning, frozen: Any) -> dict[str, Entries]:
    """{name: its entries of cond as shapes, for one row}. `frozen`: arrays or shapes. Computes nothing."""
    params = jax.eval_shape(lambda key: init(conditioning, key), jax.random.key(0))

    def of(c: Condition) -> Entries:
        null = jax.tree.map(lambda n: jax.ShapeDtypeStruct((1, *np.shape(n)), np.asarray(n).dtype), c.null)
        return jax.eval_shape(lambda p, f, v: c.encode(p, f, v), params.get(c.name), frozen, null)

    return {c.name: of(c) for c in conditioning.conditions}


def channels(shapes: Mapping[str, Entries]) -> dict[str, int]:
    """{name: channels that the condition joins to x_t} of the conditions that join some; `shapes` as `entries` returns them."""
    return {name: entry["channels"].shape[-1] for name, entry in shapes.items() if "channels" in entry}


def check(shapes: Mapping[str, Entries], network: Any, name: str) -> None:
    """Raise ValueError for a condition whose entries the network, which configs call `name`, does not take, or in another width."""
    givers: dict[str, str] = {}
    for condition, each in shapes.items():
        for entry in each:
            if entry in givers and entry not in JOINED:
                raise ValueError(
                    f"config.condition.{givers[entry]} and config.condition.{condition} both give cond[{entry!r}]; expected one of them"
                )
            givers[entry] = condition
    if type(network) not in models.INPUTS:  # the network itself says what it does not take
        return
    try:
        takes = models.inputs(network).get("cond", {})
    except ValueError:  # its options leave a width open, which the first input fixes
        return
    for condition, each in shapes.items():
        for entry, shape in each.items():
            if entry == "channels" or entry.removesuffix("_mask") in takes:
                expected = takes.get(entry)
                if expected is not None and shape.ndim > 1 and shape.shape[-1] != expected.shape[-1]:
                    raise ValueError(
                        f"config.condition.{condition} gives cond[{entry!r}] of width {shape.shape[-1]}; config.model ({name}) takes "
                        f"{expected.shape[-1]}"
                    )
                continue
            there = ", ".join(takes) or "none"
            raise ValueError(
                f"config.condition.{condition} gives cond[{entry!r}], which config.model ({name}) does not take; it takes {there}"
            )
