"""The reader of torch's files: what torch.save wrote, and files that are damaged or want code to run."""

import argparse
import collections
import contextlib
import datetime
import io
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from ldm_jax.weights import inert_pickle, torch_pickle

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
]
DTYPES += ["uint16", "bool", "complex64"]
# The old container knows no storages of these.
NEW_ONLY = ("uint16", "float8_e4m3fn", "float8_e5m2")


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


def made_up(monkeypatch, module, name, base=object):
    """A class of a library that is not here, which pickles by its name alone."""
    for k in range(len(parts := module.split("."))):
        part = ".".join(parts[: k + 1])
        monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
    kind = type(name, (base,), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


@pytest.fixture
def lightning(monkeypatch):
    Callback = made_up(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    Attributes = made_up(monkeypatch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    Config = made_up(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    config = Config()
    config._content, config._parent = {"lr": 1e-4}, config
    return {
        "callbacks": {Callback: {"best_model_path": pathlib.Path("x"), "best_model_score": None}},
        "hyper_parameters": Attributes(lr=1e-4, betas=(0.9, 0.999), config=config),
        "args": argparse.Namespace(seed=1, where=pathlib.PurePosixPath("a/b")),
        "best": np.float64(0.1),
        "stats": np.zeros(3),
        "seen": {1, 2},
        "frozen": frozenset({"a"}),
        "counts": collections.Counter("ab"),
        "more": collections.defaultdict(dict, {(1, 2): {}}),
        "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        "what": (torch.Size([1]), torch.float16, torch.device("cpu"), torch.nn.functional.relu, bytearray(b"a"), 1j),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "loops": {"fit": torch.nn.Linear(1, 1), "opt": torch.optim.SGD([torch.zeros(1)], 0.1)},
        "big": 1 << 200,
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_lightning_writes_beside_the_weights_is_left_aside(tmp_path, lightning, new, protocol):
    weights = {"a.weight": torch.arange(3.0), "a.bias": torch.nn.Parameter(torch.ones(1)), "hooked": torch.ones(2)}
    weights["hooked"].note = "a tensor with an attribute of its own"
    Attributes = type(lightning["hyper_parameters"])
    for state in (weights, {"state_dict": weights}, Attributes(weights)):
        how = {"_use_new_zipfile_serialization": new, "pickle_protocol": protocol}
        torch.save(lightning | {"state_dict": state}, tmp_path / "a.ckpt", **how)
        for name in lightning:  # each is met
            assert name.encode() in (tmp_path / "a.ckpt").read_bytes()
        tensors = torch_pickle.load(tmp_path / "a.ckpt")
        assert {name: value.tolist() for name, value in tensors.items()} == {k: v.tolist() for k, v in weights.items()}


def test_which_dict_of_tensors_is_read(tmp_path, capsys):
    def read(content):
        torch.save(content, tmp_path / "a.pt")
        return {name: float(value) for name, value in torch_pickle.load(tmp_path / "a.pt").items()}

    one, two = ({f"w{k}": torch.tensor(float(value)) for k in range(4)} for value in (1, 2))
    for name in ("model", "module", "ema", "params", "params_ema"):
        assert set(read({name: one, "step": torch.tensor(3.0), "loss": {"a": torch.tensor(0.5)}}).values()) == {1}
    assert capsys.readouterr().err == ""
    # An average before the weights, which a line says (DiT's and ESRGAN's files).
    for names in (("model", "ema"), ("params", "params_ema")):
        assert set(read(dict(zip(names, (one, two)))).values()) == {2}
        assert f"{names[1]!r} is read, {names[0]} left aside" in capsys.readouterr().err
    # The options of an average are no weights.
    assert set(read({"model": one, "ema": {"decay": torch.tensor(0.9)}}).values()) == {1}
    assert read({"w": torch.tensor(1.0), "other": {"a": torch.tensor(2.0)}}) == {"w": 1}
    loop = {"model": {}}
    loop["model"]["state_dict"] = loop["model"]
    with pytest.raises(ValueError, match="expected one dict of tensors"):
        read(loop)


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


DOUBLED = b")" + b"2\x86" * 60  # a tuple of 2^60 empty ones
NESTED = b")" + b"\x85" * 20_000  # deeper than C's stack
STORAGE = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI3\ntQ"


def of_tensor(size=b"(I3\nt", stride=b"(I1\nt", storage=STORAGE):
    return b"\x80\x02}S'a'\nctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I0\n" + size + stride + b"\x89}tRs."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        *(
            (program, message)
            for grown in (DOUBLED, NESTED)
            for program, message in (
                (of_tensor(grown), "sizes, strides and offsets must be integers"),
                (
                    of_tensor(storage=STORAGE.replace(b"S'0'\n", grown)),
                    "a storage is called by something other than text",
                ),
                (of_tensor(storage=STORAGE.replace(b"S'storage'\n", grown)), "refers to a tuple, expected a storage"),
                (b"\x80\x02}" + grown + b"Ns.", "no tensors by name"),
                (b"\x80\x02}S'a'\nctorch\ndevice\n" + grown + b"\x85Rs.", "expected one dict of tensors"),
                (b"\x80\x02" + grown + b"Q.", "refers to something other than a storage"),
                (b"\x80\x02ccollections\nOrderedDict\n" + grown + b"\x85R.", "no tensors by name"),
                (b"\x80\x02" + grown + b".", "holds a tuple, expected a dict of tensors"),
            )
        ),
        (of_tensor(b"(I1000000000000\nt", b"(I0\nt"), "repeats a storage of 3 elements"),
        (of_tensor(b"(" + b"I1\n" * 65 + b"t"), "tuples of at most 64 numbers"),
        (of_tensor(b"(\x8a\xff" + b"\x7f" * 255 + b"t"), "must be integers >= 0, met int"),
        (b"\x80\x02" + b"N" * 5_000 + b".", "more than 5000 instructions"),
        (b"\x80\x02\x8d" + b"\xff" * 7 + b"\0a.", "states a text of 72057594037927935 bytes"),
        (b"\x80\x02a.", "takes what it did not put there"),
        (b"\x80\x02u.", "closes a group that it did not open"),
        (b"\x80\x02h\x07.", "takes what it did not put there"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "arguments that it does not take"),
        (b"\x80\x02cx\ny\n" + b")R" * 1_000 + b".", "asks for x.y, expected a dict of tensors"),
    ],
)
def test_pickles_that_grow_without_end(tmp_path, monkeypatch, program, message):
    zip_of(tmp_path / "a.pt", program, [("0", bytes(12))])
    if b"N" * 5_000 in program:
        monkeypatch.setattr(inert_pickle, "MOST_INSTRUCTIONS", 5_000)
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        torch_pickle.load(tmp_path / "a.pt")


def test_archives_that_lie(tmp_path):
    program = of_tensor()
    for storages, message in (
        ([("0", bytes(8))], "storage 0 has 8 bytes, expected 12"),
        ([], "storage 0 is missing"),
        ([("0", bytes(12)), ("0", bytes(12))], "two members 'data/0'"),
    ):
        with pytest.warns() if "two" in message else contextlib.nullcontext():
            zip_of(tmp_path / "a.pt", program, storages)
        with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
            torch_pickle.load(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/constants.pkl", b"N.")
    with pytest.raises(ValueError, match="an archive of TorchScript"):
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
