"""Folders and files of weights: what is read first, what is refused and how it is said, and how much memory it takes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ldm_jax import weights
from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.clip import CLIPText
from ldm_jax.weights import files, hub, layout

ROOT = pathlib.Path(__file__).parents[2]
SMALL = AutoencoderKL(block_out_channels=(2,), norm_num_groups=1, layers_per_block=1, mid_block_add_attention=False)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_params(module):
    random = np.random.default_rng(0)
    shapes = weights.FORMATS[weights.class_of(module)].shapes(module)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "vae"
    weights.save(folder, SMALL, random_params(SMALL))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "vae")


def first(params) -> float:
    return float(params["encoder"]["conv_in"]["bias"][0])


DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8]


def test_safetensors_agrees_with_the_library(tmp_path):
    random = np.random.default_rng(0)
    arrays = {np.dtype(d).name: (random.normal(size=(3, 5)) * 9).astype(d) for d in DTYPES}
    arrays |= {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 3), np.float32), "b": np.array([True])}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    files.write_safetensors(tmp_path / "ours.safetensors", layout.tensors(arrays))
    for got in (
        {name: tensor.read() for name, tensor in files.open_safetensors(tmp_path / "theirs.safetensors").items()},
        safetensors.numpy.load_file(tmp_path / "ours.safetensors"),
    ):
        assert got.keys() == arrays.keys()
        for name, value in arrays.items():
            assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
            assert got[name].tobytes() == value.tobytes(), name
    with safetensors.safe_open(tmp_path / "ours.safetensors", "numpy") as file:
        # Without it transformers refuses the file.
        assert file.metadata() == {"format": "pt"}


def test_a_file_that_is_cut_short(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{WEIGHTS}: .*cut short"):
            weights.load(folder)


def with_header(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not a .safetensors file: its header does not read"),
        ([], "its header does not read"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "its header does not read"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, "a is of dtype F4, expected one of F64"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "lies at bytes 0 to 4: damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "lies at bytes -4 to 0: damaged"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "damaged"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "its header does not read"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', "its header does not read"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "its header does not read"),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "its header does not read"),
        (b"[" * 100_000, "its header does not read"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "cut short: a ends at byte"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    with_header(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
        files.open_file(tmp_path / "a.safetensors")


DATA = np.arange(4, dtype=np.float32).tobytes()
ONE, TWO = ({"dtype": "F32", "shape": [1], "data_offsets": [k, k + 4]} for k in (0, 4))
# What the reference reader says of the same bytes is asked in the test.
DAMAGED = {
    "sound": ({"a": ONE, "b": TWO}, DATA[:8], None),
    "sound, spaces after the header": (json.dumps({"a": ONE}).encode() + b"   ", DATA[:4], None),
    "sound, empty": ({}, b"", None),
    "sound, texts beside": ({"__metadata__": {"format": "pt"}, "a": ONE}, DATA[:4], None),
    "sound, nothing in it": ({"a": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}}, b"", None),
    "an overlap": ({"a": ONE, "b": TWO | {"data_offsets": [2, 6]}}, DATA[:6], "a and b overlap"),
    "the same bytes twice": ({"a": ONE, "b": ONE}, DATA[:4], "a and b overlap"),
    "a hole": ({"a": ONE, "b": TWO | {"data_offsets": [8, 12]}}, DATA[:12], "a and b leave 4 bytes between them"),
    "a hole at the start": ({"b": TWO}, DATA[:8], "the header and b leave 4 bytes"),
    "more than is listed": ({"a": ONE}, DATA[:8], "4 bytes at its end belong to no tensor"),
    "less than is listed": ({"a": ONE, "b": TWO}, DATA[:6], "cut short: b ends at byte"),
    "of another size": ({"a": ONE | {"shape": [2]}}, DATA[:4], "lies at bytes 0 to 4: damaged"),
    "no UTF-8": (b'{"\xff": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA[:4], "header does not read"),
    "half a character": (b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA[:4], "does not read"),
    "UTF-16": (json.dumps({"a": ONE}).encode("utf-16"), DATA[:4], "header does not read"),
    "numbers beside": ({"__metadata__": {"step": 1}, "a": ONE}, DATA[:4], "header does not read"),
    "a length past the end": (None, (99).to_bytes(8, "little") + b"{}", "a header of 99 bytes in a file of 10"),
    "a huge length": (None, (1 << 40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes in a file of 10"),
    "a hundred dimensions": ({"a": ONE | {"shape": [1] * 100}}, DATA[:4], "header does not read"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_headers_are_refused_as_the_reference_reader_does(tmp_path, what):
    header, data, message = DAMAGED[what]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data) if header is None else with_header(path, header, data)
    if message is None:
        assert {k: v.read().tobytes() for k, v in files.open_file(path).items()} == {
            k: v.tobytes() for k, v in safetensors.numpy.load_file(path).items()
        }
        return
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        files.open_file(path)
    if what != "a hundred dimensions":  # numpy has not so many
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)


def test_a_tensor_that_is_listed_twice(tmp_path):
    entry = json.dumps(ONE)
    with_header(tmp_path / "a.safetensors", f'{{"a": {entry}, "a": {entry}}}'.encode(), DATA[:4])
    with pytest.raises(ValueError, match=r"its header does not read .'a' is listed twice"):
        files.open_file(tmp_path / "a.safetensors")


def test_what_a_file_holds_decides_and_not_its_name(tmp_path):
    torch = pytest.importorskip("torch")
    array = np.arange(3, dtype=np.float32)
    files.write_safetensors(tmp_path / "theirs", layout.tensors({"module.a": array}))
    for name in ("a.SAFETENSORS", "a.safetensors", "a.ckpt", "a.pt", "a.bin", "a"):
        shutil.copy(tmp_path / "theirs", tmp_path / name)
        assert files.open_tensors(tmp_path / name)["a"].read().tolist() == [0, 1, 2], name
    for new in (True, False):
        for name in ("b.CKPT", "b.safetensors", "b.pth", "b"):
            state = {"a": torch.tensor(array), "other.a": torch.tensor(array)}
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
            assert set(files.open_tensors(tmp_path / name)) == {"a", "other.a"}, name


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"a pointer of Git LFS, expected the file that it stands for \(git lfs pull\)"),
        (b"<!DOCTYPE html><html>Not found</html>", "a page of HTML or XML"),
        (b"\n <?xml version='1.0'?><Error>", "a page of HTML or XML"),
        (b"", r"an empty file \(0 bytes\), cut short"),
        (b"\x1f\x8b\x08" + b"\0" * 40, "compressed with gzip"),
        (b"GGUF" + b"\0" * 40, "of the format GGUF"),
        (b"PK\x03\x04" + b"\0" * 40, "cut short or damaged: of the 44 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        files.open_file(tmp_path / name)


def test_files_that_are_something_else(folder):
    with pytest.raises(ValueError, match=r"expected a file that ends in \.safetensors or \.bin"):
        files.open_file(folder / "config.json")
    with pytest.raises(ValueError, match="no such file"):
        files.open_file(folder / "none.safetensors")


def put(folder, name, value):
    """A file of weights in which every number is `value`."""
    path = folder / name
    state = {k: np.full(t.shape, value, np.float32) for k, t in STATE.items()}
    if path.suffix == ".safetensors":
        files.write_safetensors(path, layout.tensors(state))
    else:
        torch = pytest.importorskip("torch")
        torch.save({k: torch.tensor(v) for k, v in state.items()}, path)


STATE = layout.written(weights.autoencoder_kl.table(SMALL), random_params(SMALL))


def test_which_file_is_read(folder):
    (folder / WEIGHTS).unlink()
    for value, name in enumerate(("fp16.safetensors", "bin", "safetensors"), 1):
        put(folder, f"diffusion_pytorch_model.{name}", value)
        assert first(weights.load(folder)[1]) == value
    put(folder, "diffusion_pytorch_model.non_ema.safetensors", 7)
    assert first(weights.load(folder)[1]) == 3
    for variant, value in (("fp16", 1), ("non_ema", 7)):
        assert first(weights.load(folder, variant=variant)[1]) == value
    with pytest.raises(
        ValueError, match=r"no file of weights of variant 'bf16', expected .*it holds config.json, diff"
    ):
        weights.load(folder, variant="bf16")


def test_a_folder_without_weights_is_listed(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.msgpack")
    with pytest.raises(
        ValueError, match=r"no file of weights, expected .*holds config\.json, diffusion_pytorch_model\.msg"
    ):
        weights.load(folder)


def test_shards(folder):
    params = random_params(SMALL)
    weights.save(folder, SMALL, params, max_shard_size=1000)
    index = folder / f"{WEIGHTS}.index.json"
    where = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(where.values()))
    assert len(shards) > 2 and where.keys() == STATE.keys()
    sizes = [[t.read().nbytes for t in files.open_file(folder / shard).values()] for shard in shards]
    assert all(sum(held) <= 1000 or len(held) == 1 for held in sizes)
    assert first(weights.load(folder)[1]) == first(params)
    text = index.read_text()
    index.write_text(text.replace(shards[0], "../" + shards[0]))
    with pytest.raises(ValueError, match=r"names the shard '\.\./diffusion.*which is not in"):
        weights.load(folder)
    index.write_text(text)
    name = next(n for n in where if where[n] == shards[0])
    moved = where | {name: shards[1]}
    (folder / shards[0]).rename(folder / "away")
    with pytest.raises(ValueError, match=f"names the shard '{shards[0]}', which is not in"):
        weights.load(folder)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in moved.items() if v != shards[0]}}))
    with pytest.raises(ValueError, match=rf"{shards[1]}: lacks {name}, which {index.name} puts there"):
        weights.load(folder)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="expected a weight_map"):
            weights.load(folder)


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path):
    for name, state in {"1": {"a": 1.0, "b": 1.0}, "2": {"a": 2.0, "b": 2.0}, "3": {"a": 3.0}}.items():
        arrays = {key: np.array(value, np.float32) for key, value in state.items()}
        files.write_safetensors(tmp_path / f"{name}.safetensors", layout.tensors(arrays))

    def read(**where):
        text = json.dumps({"weight_map": {key: f"{shard}.safetensors" for key, shard in where.items()}})
        (tmp_path / "index.json").write_text(text)
        return {key: float(tensor.read()) for key, tensor in files.open_index(tmp_path / "index.json").items()}

    assert read(a="2", b="1") == {"a": 2, "b": 1} and read(a="1", b="2") == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"3\.safetensors: lacks b, which index\.json puts there"):
        read(a="3", b="3")
    # Though another shard that is open has it.
    with pytest.raises(ValueError, match=r"3\.safetensors: lacks b, which index\.json puts there"):
        read(a="1", b="3")


def test_whether_a_folder_holds_weights(folder):
    assert files.holds_weights(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.bin")
    assert files.holds_weights(folder)
    (folder / "diffusion_pytorch_model.fp16.bin").unlink()
    assert not files.holds_weights(folder) and not files.holds_weights(folder / "nowhere")


def test_by_a_name_of_the_hub(folder, monkeypatch):
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options["revision"]))
        return str(folder.parent)

    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert first(weights.load("hub:a/b@main", "vae")[1]) == first(random_params(SMALL))
    assert asked == [("a/b", "main")]


def test_what_is_fetched_of_a_repository():
    from huggingface_hub.utils import filter_repo_objects

    expected = [
        *("model_index.json", "unet/config.json", "tokenizer/merges.txt", "tokenizer/spiece.model"),
        *("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model.safetensors"),
        *("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors"),
    ]
    others = [
        *("v1-5-pruned.safetensors", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.bin", "unet/code.py"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16-00001-of-2.safetensors"),
        *(
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
        ),
        *("safety_checker/model.safetensors", "v1-5-pruned.ckpt", "model.onnx"),
    ]
    fetched = filter_repo_objects(expected + others, allow_patterns=hub.FILES, ignore_patterns=hub.LEFT_OUT)
    assert list(fetched) == expected


def test_shardings_and_place_are_not_given_at_once(folder):
    for path in (folder, folder / "nowhere"):
        with pytest.raises(ValueError, match=r"^shardings and place are both given"):
            weights.load(path, shardings=lambda path, shape: None, place=lambda path, value: value)


def test_numbers_that_float16_does_not_hold(folder):
    params = random_params(SMALL)
    params["quant_conv"]["bias"][0] = 1e5
    weights.save(folder, SMALL, params)
    with pytest.raises(
        ValueError, match=r"vae: quant_conv\.bias: 100000 is out of the range of float16; take bfloat16"
    ):
        weights.load(folder, dtype="float16")
    assert float(weights.load(folder, dtype="bfloat16")[1]["quant_conv"]["bias"][0]) == pytest.approx(1e5, rel=1e-2)


def test_config_json(folder):
    config = json.loads((folder / "config.json").read_text())

    def refuses(message, **changed):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changed).items() if v != "none"}))
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            weights.load(folder)

    refuses("the class of network is 'UNet3DModel'; there are AutoencoderKL, ", _class_name="UNet3DModel")
    refuses("the class of network is None", _class_name="none")
    refuses("the class of network is 'BertModel'", _class_name="none", architectures=["BertModel"])
    refuses("AutoencoderKL: option double_z .here True. is unknown", double_z=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        weights.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list, expected a JSON object"):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        weights.load(folder)
    with pytest.raises(ValueError, match="nowhere: no such folder or file"):
        weights.load(folder / "nowhere")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "layers_per_block",
            10_000_000,
            "config.json: AutoencoderKL: layers_per_block is 10000000, expected a whole number",
        ),
        (
            "layers_per_block",
            1000,
            "AutoencoderKL: a network of layers_per_block 1000 has more than 1000 tensors, the file has",
        ),
        ("layers_per_block", 1.5, "layers_per_block is 1.5, expected a whole number from 0 to 1000"),
        ("in_channels", 10**12, "in_channels is 1000000000000, expected a whole number from 1 to 1048576"),
        ("in_channels", 10**6, "1 of another shape: encoder.conv_in.weight"),
        ("norm_num_groups", 0, "norm_num_groups is 0, expected a whole number from 1"),
        ("norm_num_groups", 3, "a multiple|not divisible|make no network|groups"),
        ("block_out_channels", [2, -1], "block_out_channels is -1, expected a whole number"),
        ("block_out_channels", [2] * 1000, "block_out_channels has 1000 entries, expected at most 16"),
        ("down_block_types", ["DownEncoderBlock2D"] * 100, "down_block_types has 100 entries"),
        ("act_fn", ["silu"] * 1000, "act_fn has 1000 entries"),
        ("scaling_factor", 0, "scaling_factor is 0, expected a number > 0"),
        ("scaling_factor", float("nan"), "scaling_factor is nan, expected a finite number"),
        ("scaling_factor", "1", "scaling_factor is '1', expected a number > 0"),
        ("use_quant_conv", "no", "use_quant_conv is 'no', expected true or false"),
        ("_class_name", {"a": 1}, "the class of network is None"),
        ("x" * 1000, ["y"] * 1000, "is unknown"),
    ],
)
def test_sizes_are_checked_before_anything_is_traced(folder, option, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {option: value}))
    with pytest.raises(ValueError, match=message) as refusal:
        weights.load(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 2000


def test_what_a_moving_average_left_in_the_config_is_skipped(folder):
    """Of SDXL's inpainting U-Net, as published."""
    config = json.loads((folder / "config.json").read_text())
    left = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 2 / 3}
    left |= {"update_after_step": 0, "use_ema_warmup": False}
    (folder / "config.json").write_text(json.dumps(config | left))
    assert first(weights.load(folder)[1]) == first(random_params(SMALL))


PUBLISHED = pathlib.Path(os.environ.get("LDM_DATA", "data"), "published")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published configs are not here")
def test_published_configs_read():
    """Every network of a class that is here, with its bounds; none is of a size that a bound refuses."""
    read = 0
    for path in PUBLISHED.rglob("config.json"):
        config = json.loads(path.read_text())
        if weights.class_named(config) in weights.FORMATS:
            weights.module_of(config)
            read += 1
    assert read >= 40


def test_a_whole_pipeline_is_told_by_its_parts(folder):
    (folder.parent / "model_index.json").write_text("{}")
    shutil.copytree(folder, folder.parent / "unet")
    with pytest.raises(ValueError, match="a whole pipeline, expected one of its networks: subfolder=unet, vae"):
        weights.load(folder.parent)
    assert weights.load(folder.parent, "vae")[0] == SMALL.copy(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantised_weights_are_refused_by_name(folder, dtype):
    state = {name: tensor.read() for name, tensor in STATE.items()}
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].astype(dtype)
    files.write_safetensors(folder / WEIGHTS, layout.tensors(state))
    with pytest.raises(ValueError, match=f"1 not of float32, .*: encoder.conv_in.weight {np.dtype(dtype).name}"):
        weights.load(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_eight_bits_are_cast_with_a_word(tmp_path, capsys, dtype, suffix):
    """To float16, which holds each of their numbers, subnormal ones included."""
    numbers = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype))
    path = tmp_path / f"a.{suffix}"
    if suffix == "ckpt":
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.from_numpy(numbers.view(np.uint8)).view(getattr(torch, dtype))}, path)
    else:
        files.write_safetensors(path, layout.tensors({"a": numbers}))
    tensor = files.open_file(path)["a"]
    assert capsys.readouterr().err == f"note: {path}: 1 tensors of {dtype} are cast to float16\n"
    assert tensor.dtype == tensor.read().dtype == np.float16
    np.testing.assert_array_equal(tensor.read().astype(np.float32), numbers.astype(np.float32))


def test_a_pickle_that_asks_for_code(folder):
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"the pickle asks for posix.system"):
        weights.load(folder)


def test_a_save_that_fails_harms_nothing(folder, monkeypatch):
    before = first(weights.load(folder)[1])
    new = jax.tree.map(lambda x: x + 1, random_params(SMALL))
    write, count = files.write_safetensors, []

    def fails(path, tensors):
        count.append(path)
        if len(count) == 2:
            raise OSError("no space left on device")
        write(path, tensors)

    monkeypatch.setattr(files, "write_safetensors", fails)
    with pytest.raises(OSError, match="no space"):
        weights.save(folder, SMALL, new, max_shard_size=1000)
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]
    assert first(weights.load(folder)[1]) == before
    monkeypatch.undo()
    weights.save(folder, SMALL, new, max_shard_size=1000)
    assert first(weights.load(folder)[1]) == pytest.approx(before + 1)
    assert not (folder / WEIGHTS).exists()


def test_a_folder_that_holds_something_else_is_not_replaced(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt; expected a folder that is new, empty or an earlier save"):
        weights.save(folder, SMALL, random_params(SMALL))
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        weights.save(folder / "notes.txt", SMALL, random_params(SMALL))


def test_facts(tmp_path):
    params = random_params(SMALL)
    weights.save(tmp_path / "a", SMALL, params, facts={"sample_size": 64, "force_upcast": False})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["sample_size"], config["force_upcast"]) == (64, False)
    with pytest.raises(ValueError, match=r"option sample_sizes .* is unknown"):
        weights.save(tmp_path / "b", SMALL, params, facts={"sample_sizes": 64})
    with pytest.raises(ValueError, match=r"facts {'latent_channels': 8} change what the network computes"):
        weights.save(tmp_path / "b", SMALL, params, facts={"latent_channels": 8})
    assert not (tmp_path / "b").exists()
    # All of an older config.json: what it says of the class is not its to say.
    old = config | {"_class_name": "VQModel", "_diffusers_version": "0.1", "_name_or_path": "elsewhere"}
    weights.save(tmp_path / "c", SMALL, params, facts=old)
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == config
    text = CLIPText(vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1)
    facts = {"architectures": ["CLIPModel"], "model_type": "clip", "initializer_range": 0.5}
    weights.save(tmp_path / "d", text, random_params(text), facts=facts)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPTextModel"], "clip_text_model")
    assert config["initializer_range"] == 0.5


def test_parameters_of_another_module_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"params are not this module's: .* more do not fit"):
        weights.save(tmp_path / "a", SMALL.copy(latent_channels=8), random_params(SMALL))


def test_dtypes_that_no_module_computes_in(saved):
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of"):
        weights.load(saved, dtype="int8")


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory in use is read from /proc")
def test_memory_and_placement_in_a_process_of_its_own(tmp_path):
    module = CLIPText(vocab_size=30_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    params = random_params(module)
    weights.save(tmp_path / "a", module, params)
    words = [sys.executable, "-m", "tests.weights.load_in_process", str(tmp_path / "a")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size > 180e6
    assert 0.9 * size < result["peak"] < 1.2 * size
    table = params["token_embedding"]["embedding"]
    for device in range(2):
        half = table[device * 15_000 : (device + 1) * 15_000]
        shape, total = result["shards"][str(device)]
        assert shape == [15_000, 512] and total == pytest.approx(float(half.sum(dtype=np.float64)), abs=1)
    assert result["devices"] == 2
