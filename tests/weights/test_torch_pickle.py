"""The reader of torch's files: what torch.save wrote, and files that are damaged or want code to run."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest

from ldm_jax.weights import torch_pickle

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int16", "int8", "uint8"]
DTYPES += ["uint16", "bool", "complex64"]
# The old container knows no storages of these.
NEW_ONLY = ("uint16", "float8_e4m3fn")


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_writes(tmp_path, new):
    generator = torch.Generator().manual_seed(0)
    state = collections.OrderedDict()
    for name in DTYPES:
        if new or name not in NEW_ONLY:
            state[name] = (torch.randn((3, 4), generator=generator) * 20).abs().to(getattr(torch, name))
    base = torch.arange(60.0).reshape(3, 4, 5)
    state |= {"transposed": base.permute(2, 0, 1), "window": base[1:, ::2, 3], "scalar": torch.tensor(7.5)}
    state |= {
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0]),
        "expanded": base[0, :1].expand(4, 5),
    }
    state |= {"step": 7, "note": "not a tensor"}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    arrays = torch_pickle.load(tmp_path / "a.pth")
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert str(arrays[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        raw = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.zeros(0)
        np.testing.assert_array_equal(bits(arrays[name]).ravel(), raw.numpy(), err_msg=name)


def test_storages_that_are_views_of_another(tmp_path):
    """As the old container had them; torch still reads such files and writes no more of them, so the pickle is made by hand."""
    whole = np.arange(10, dtype=np.float32)

    class Storage:
        def __init__(self, view):
            self.view = view

    class Rebuilt:
        def __init__(self, view, offset, size):
            self.arguments = Storage(view), offset, (size,), (1,), False, collections.OrderedDict()

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, self.arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return "storage", torch.FloatStorage, "root", "cpu", len(whole), obj.view
            return None

    with (tmp_path / "a.pth").open("wb") as file:
        for header in (torch_pickle.LEGACY_MAGIC, 1001, {"little_endian": True}):
            pickle.dump(header, file, 2)
        views = {"view": (("one", 4, 3), 1, 2), "other": (("two", 7, 3), 0, 3), "root": (None, 0, 10)}
        Pickler(file, 2).dump({name: Rebuilt(*arguments) for name, arguments in views.items()})
        pickle.dump(["root"], file, 2)
        file.write(len(whole).to_bytes(8, "little") + whole.tobytes())
    theirs, ours = torch.load(tmp_path / "a.pth"), torch_pickle.load(tmp_path / "a.pth")
    assert theirs["view"].tolist() == [5, 6]
    assert {name: value.tolist() for name, value in ours.items()} == {name: t.tolist() for name, t in theirs.items()}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_state_dict_of_a_module_and_nesting(tmp_path, new):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    arrays = torch_pickle.load(tmp_path / "a.ckpt")
    assert set(arrays) == set(net.state_dict())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())

    torch.save({"net": net.state_dict(), "ema": net.state_dict()}, tmp_path / "b.pt")
    assert set(torch_pickle.load(tmp_path / "b.pt", key="ema")) == set(net.state_dict())
    with pytest.raises(ValueError, match=r"b\.pt: expected one dict of tensors, found \['net', 'ema'\]"):
        torch_pickle.load(tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no dict of tensors under 'nets'"):
        torch_pickle.load(tmp_path / "b.pt", key="nets")
    torch.save({"net": net.state_dict()}, tmp_path / "c.pt")
    assert set(torch_pickle.load(tmp_path / "c.pt")) == set(net.state_dict())


class Touch:
    """Unpickling this creates the file: what an attacker would do, made harmless and visible."""

    def __init__(self, path, call):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (str(self.path), "w")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "key of nested", "metadata"])
def test_code_is_named_and_never_runs(tmp_path, new, place):
    bomb = Touch(tmp_path / "owned", open)
    state = collections.OrderedDict(a=torch.ones(2))
    if place == "value":
        state["b"] = bomb
    elif place == "key of nested":
        state["b"] = [{"c": (1, bomb)}]
    else:
        state._metadata = bomb
    torch.save(state, tmp_path / "bad.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"bad\.pth: the pickle asks for io\.open, which is not part of a tensor"):
        torch_pickle.load(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()
    # The same file does its deed in a reader that trusts it, so that the line above says something.
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "owned").exists()


def zip_of(path, pickled, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, data in storages:
            archive.writestr(f"a/data/{key}", data)


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01a\x85R.", "builtins.eval"),
        (b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.", "torch.serialization.os"),
        (b"(S'a'\niposix\nsystem\n.", "posix.system"),
        (b"ctorch._utils\n__import__\n(S'os'\ntR.", "torch._utils.__import__"),
        (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
    ],
)
def test_hand_written_programs(tmp_path, program, named):
    zip_of(tmp_path / "bad.pt", program)
    with pytest.raises(ValueError, match=f"asks for {named}"):
        torch_pickle.load(tmp_path / "bad.pt")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncated_files(tmp_path, new):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "a.pth").read_bytes()
    assert len(torch_pickle.load(tmp_path / "a.pth")["a"]) == 100
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "b.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"b\.pth: "):
            torch_pickle.load(tmp_path / "b.pth")


def test_a_flipped_byte_in_a_storage_is_seen(tmp_path):
    torch.save({"a": torch.full((100,), 1.2345)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    at = data.find(np.float32(1.2345).tobytes() * 3)
    data[at + 2] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        torch_pickle.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((3,), (1,), 0, None),
        ((2, 2), (1, 1), 0, None),
        ((4,), (1,), 0, "reaches element 3 of a storage of 3"),
        ((3,), (1,), 1, "reaches element 3 of a storage of 3"),
        ((2,), (1000000000,), 0, "reaches element"),
        ((2,), (-1,), 1, "must be integers >= 0"),
        ((2, 2), (1,), 0, "as many strides"),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset, message):
    def ints(values):
        return b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"

    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI3\ntQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I%d\n" % offset + ints(size) + ints(stride)
    program = b"\x80\x02}S'a'\n" + tensor + b"\x89}tRs."
    zip_of(tmp_path / "a.pt", program, [("0", np.arange(3, dtype=np.float32).tobytes())])
    if message is None:
        assert torch_pickle.load(tmp_path / "a.pt")["a"].shape == size
        return
    with pytest.raises(ValueError, match=message):
        torch_pickle.load(tmp_path / "a.pt")


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        torch_pickle.load(tmp_path / "none.pt")
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="neither a zip archive nor torch's older container"):
        torch_pickle.load(tmp_path / "a.bin")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a dict of tensors"):
        torch_pickle.load(tmp_path / "list.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        torch_pickle.load(tmp_path / "module.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}." + b" " * 100000)
    (tmp_path / "deflated.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        torch_pickle.load(tmp_path / "deflated.pt")
