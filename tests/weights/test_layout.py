"""Tables of names: every kind of row both ways, and what is said of tensors that do not fit."""

import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.weights import layout
from ldm_jax.weights.kinds import CONV1D, CONV2D, CONV3D, DENSE, EMBEDDING, NORM, PIXEL, patch
from ldm_jax.weights.layout import Row, under

random = np.random.default_rng(0)


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def normal(*shape):
    return random.normal(size=shape).astype(np.float32)


BLOCK = (Row("norm", "ln", NORM), Row("qkv", ("q", "k", "v"), DENSE))
TABLE = (
    Row("conv_{i}/{j}", "convs.{i}.{j}", CONV2D),
    Row("patch", "embed", patch(2)),
    Row("map", "map", PIXEL),
    Row("words", "words", EMBEDDING, copies=("again.words",)),
    Row("table", "a.table"),
    Row("scale", "scale"),
    *under("block_{i}", "blocks.{i}", BLOCK),
    *under("stack", "stack.{*}", BLOCK),
    Row(None, "blocks.{i}.mask"),
)


def tensors():
    """What the table describes, in torch's names and shapes."""
    block = {"ln.weight": (4,), "ln.bias": (4,)}
    block |= {f"{n}.weight": (3, 4) for n in "qkv"} | {f"{n}.bias": (3,) for n in "qkv"}
    state = {
        "convs.0.7.weight": (5, 2, 3, 1),
        "convs.0.7.bias": (5,),
        "embed.weight": (6, 3, 2, 2),
        "embed.bias": (6,),
        "map.weight": (4, 2, 1, 1),
        "words.weight": (7, 3),
        "a.table": (2, 3),
        "scale": (),
    }
    state |= {f"{where}.{name}": shape for where in ("blocks.0", "stack.0", "stack.1") for name, shape in block.items()}
    state = {name: np.asarray(normal(*shape)) for name, shape in state.items()}
    return state | {"again.words.weight": state["words.weight"]}


def tree(state):
    """The same by hand."""

    def block(where):
        kernel = np.concatenate([state[f"{where}.{n}.weight"].T for n in "qkv"], 1)
        bias = np.concatenate([state[f"{where}.{n}.bias"] for n in "qkv"])
        norm = {"scale": state[f"{where}.ln.weight"], "bias": state[f"{where}.ln.bias"]}
        return {"norm": norm, "qkv": {"kernel": kernel, "bias": bias}}

    patch = np.stack([state["embed.weight"][:, c, i, j] for i in range(2) for j in range(2) for c in range(3)])
    kernel = state["convs.0.7.weight"]
    return {
        "conv_0": {"7": {"kernel": np.einsum("oihw->hwio", kernel), "bias": state["convs.0.7.bias"]}},
        "patch": {"kernel": patch, "bias": state["embed.bias"]},
        "map": {"kernel": state["map.weight"][:, :, 0, 0].T},
        "words": {"embedding": state["words.weight"]},
        "table": state["a.table"],
        "scale": state["scale"],
        "block_0": block("blocks.0"),
        "stack": jax.tree.map(lambda *layers: np.stack(layers), block("stack.0"), block("stack.1")),
    }


def test_every_kind_of_row_both_ways():
    state = tensors()
    expected = tree(state)
    source = state | {"blocks.3.mask": np.zeros(2, np.int64)}
    got = layout.read(TABLE, shapes_of(expected), layout.tensors(source))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected)):
        assert a.shape == b.shape and np.array_equal(a, b), jax.tree_util.keystr(path)
    back = layout.write(TABLE, got)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].shape == value.shape and np.array_equal(back[name], value), name
        assert back[name].flags.c_contiguous, name
    for name, tensor in layout.written(TABLE, got).items():
        assert (tensor.shape, tensor.dtype) == (state[name].shape, np.float32), name


def test_a_linear_map_is_read_from_a_convolution_and_back():
    state = {"map.weight": normal(4, 2)}
    shapes = {"map": {"kernel": jax.ShapeDtypeStruct((2, 4), np.float32)}}
    for kind, shape in ((PIXEL, (4, 2, 1, 1)), (DENSE, (4, 2))):
        for source in (state["map.weight"], state["map.weight"][..., None, None]):
            params = layout.read((Row("map", "map", kind),), shapes, layout.tensors({"map.weight": source}))
            assert np.array_equal(params["map"]["kernel"], state["map.weight"].T)
            assert layout.write((Row("map", "map", kind),), params)["map.weight"].shape == shape


@pytest.mark.parametrize(("axes", "kind"), [(1, CONV1D), (2, CONV2D), (3, CONV3D)])
def test_convolutions_of_any_rank_compute_what_torch_computes(axes, kind):
    """Our kernel convolves with XLA, channels last, and theirs with torch, channels first: another order of axes shows."""
    torch = pytest.importorskip("torch")
    kernel_size, size = (2, 3, 4)[:axes], (5, 6, 7)[:axes]
    theirs = getattr(torch.nn, f"Conv{axes}d")(3, 5, kernel_size)
    state = {f"c.{name}": value.detach().numpy() for name, value in theirs.state_dict().items()}
    shapes = {"c": {"kernel": (*kernel_size, 3, 5), "bias": (5,)}}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    table = (Row("c", "c", kind),)
    params = layout.read(table, shapes, layout.tensors(state))
    x = normal(2, *size, 3)
    letters = "DHW"[-axes:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    got = jax.lax.conv_general_dilated(x, params["c"]["kernel"], (1,) * axes, "VALID", dimension_numbers=numbers)
    expected = theirs(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    np.testing.assert_allclose(got + params["c"]["bias"], np.moveaxis(expected, 1, -1), atol=1e-5)
    back = layout.write(table, params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)


def test_old_spellings_are_read_and_not_written():
    table = (Row("a", "new", NORM, old=("older", "oldest")),)
    value = normal(3)
    shapes = {"a": {"scale": jax.ShapeDtypeStruct((3,), np.float32)}}
    for name in ("new", "older", "oldest"):
        params = layout.read(table, shapes, layout.tensors({f"{name}.weight": value}))
        assert list(layout.write(table, params)) == ["new.weight"]
    both = {"oldest.weight": value, "older.weight": value + 1}
    with pytest.raises(ValueError, match=r"older.weight differs from|oldest.weight differs from"):
        layout.read(table, shapes, layout.tensors(both))
    with pytest.raises(ValueError, match=r"1 missing: new.weight"):
        layout.read(table, shapes, {})


def test_what_does_not_fit_is_counted_and_named():
    state = tensors()
    shapes = shapes_of(tree(state))
    for name in [n for n in state if n.startswith("stack")]:
        del state[name]
    state |= {f"more.{k:02d}": normal(1) for k in range(12)}
    state["map.weight"] = normal(2, 4, 1, 1)
    state["a.table"] = np.zeros((2, 3), np.int8)
    state["scale"] = np.zeros((), ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError) as error:
        layout.read(TABLE, shapes, layout.tensors(state))
    message = str(error.value)
    assert "of 33 tensors that the network has: 16 missing: " in message
    assert message.count("stack.") == 10 and "and 6 more" in message
    assert "; 12 not of this network: more.00, " in message and "more.09, and 2 more" in message
    assert "1 of another shape: map.weight [2, 4, 1, 1] (expected [4, 2, 1, 1])" in message
    assert "2 not of float32, float16, bfloat16, float64: " in message
    assert "a.table int8" in message and "scale float8_e4m3fn" in message


def test_nothing_is_read_before_all_fits():
    def read():
        raise AssertionError("read")

    tensor = layout.Tensor((3,), np.dtype(np.float32), read)
    shapes = {"a": jax.ShapeDtypeStruct((3,), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(ValueError, match="1 missing: b"):
        layout.read((Row("a", "a"), Row("b", "b")), shapes, {"a": tensor})


def test_a_parameter_without_a_row_is_named():
    with pytest.raises(ValueError, match="no name in torch's files is known for the parameter other/kernel"):
        layout.read(TABLE, {"other": {"kernel": jax.ShapeDtypeStruct((1, 1), np.float32)}}, {})


def test_casting_and_placing():
    value = normal(3)
    shapes = {"a": jax.ShapeDtypeStruct((3,), np.float32)}
    seen = []

    def place(path, array):
        seen.append((path, type(array), array.dtype))
        return array

    got = layout.read((Row("a", "b.c"),), shapes, layout.tensors({"b.c": value}), dtype="bfloat16", place=place)
    assert seen == [("a", np.ndarray, ml_dtypes.bfloat16)]
    assert np.array_equal(got["a"], value.astype(ml_dtypes.bfloat16))


def test_one_tensor_is_in_memory_at_a_time():
    """Of a leaf of 2 layers of q, k and v: each read must have let go of the one before."""
    state = {f"stack.{k}.{n}.weight": normal(16, 16) for k in range(2) for n in "qkv"}
    alive = []

    def read(value):
        assert not [ref for ref in alive if ref() is not None]
        copy = value.copy()
        alive.append(weakref.ref(copy))
        return copy

    source = {name: layout.Tensor(v.shape, v.dtype, lambda v=v: read(v)) for name, v in state.items()}
    shapes = {"stack": {"qkv": {"kernel": jax.ShapeDtypeStruct((2, 16, 48), np.float32)}}}
    got = layout.read(under("stack", "stack.{*}", BLOCK[1:]), shapes, source)["stack"]["qkv"]["kernel"]
    expected = [np.concatenate([state[f"stack.{k}.{n}.weight"].T for n in "qkv"], 1) for k in range(2)]
    assert len(alive) == 6 and np.array_equal(got, np.stack(expected))


@pytest.mark.parametrize(
    ("source", "dtype", "holds", "lost"),
    [("float32", "float16", 6e4, 1e6), ("bfloat16", "float16", 6e4, 1e6), ("float64", "float32", 3e38, 1e39)],
)
def test_a_cast_that_overflows_is_an_error(source, dtype, holds, lost):
    shapes = {"a": jax.ShapeDtypeStruct((3,), np.float32)}

    def read(top, dtype):
        state = {"b.c": np.array([1, np.inf, top], source)}
        return layout.read((Row("a", "b.c"),), shapes, layout.tensors(state), dtype=dtype, place=lambda _, x: x)["a"]

    # What was infinite in the file stays so.
    np.testing.assert_array_equal(np.isfinite(read(holds, dtype)), [True, False, True])
    advice = "; take bfloat16" if dtype == "float16" else ""
    with pytest.raises(ValueError, match=rf"b\.c: [-+.e\d]+ is out of the range of {dtype}{advice}$"):
        read(lost, dtype)
    assert np.isfinite(read(holds, "bfloat16")[2])


def test_parameters_do_not_share_memory_with_what_was_given():
    """torch changes its tensors in place, and jax takes over memory that begins at a multiple of 64 bytes."""
    buffer = np.zeros(64 + 1024, np.uint8)
    start = -buffer.ctypes.data % 64
    value = buffer[start : start + 1024].view(np.float32)
    params = layout.read(
        (Row("a", "a"),), {"a": jax.ShapeDtypeStruct((256,), np.float32)}, layout.tensors({"a": value})
    )
    value += 1
    assert not np.asarray(params["a"]).any()
