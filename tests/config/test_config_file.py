"""Config files that are wrong, each refused in one line that says where and what was meant; and what a right one may leave out."""

import sys

import pytest

from ldm_jax.config import config_file
from ldm_jax.training import blocks, check

HEAD = """from configs import base
def get_config(arg=""):
    c = base.get_config()
    c.task = {"name": "autoencoder"}
    c.model = {"name": "autoencoder_kl"}
    """
FILES = {
    "def get_config(arg=''):\n    raise RuntimeError('boom')": "line 2: RuntimeError: boom",
    "def get_config(arg=''):\n    return {}['q']": "line 2: KeyError: 'q'",
    "def get_config(arg=''):\n    return get_config()": "line 2: RecursionError",
    "def get_config(arg=''):\n    return {'seed': 0}": "returned dict; expected the ConfigDict",
    "def get_config(arg=''):\n    pass": "returned NoneType",
    "from ml_collections import ConfigDict\ndef get_config(arg=''):\n    return ConfigDict()": "an empty config",
    "x = 1": "has no function get_config",
    "import sys\nsys.exit(0)": "line 2: it ends the program (SystemExit: 0)",
    "import nowhere_at_all": "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'",
    "\ndef get_config(:": "line 2: SyntaxError: invalid syntax",
    "x = 1\0": "SyntaxError: source code string cannot contain null bytes",
    HEAD + "c.train.batchsize = 5\n    return c": "config.train.batchsize is unknown; did you mean batch_size?",
    HEAD + "c.trian = 5\n    return c": "config.trian is unknown; did you mean train?",
    HEAD + "c.trian.images = 5\n    return c": 'Did you mean "train" instead of "trian"?',
    HEAD + "c.input = {'size': 32}\n    return c": "config.input.size is unknown",
    HEAD + "c.ema = {'half_life': (5,)}\n    return c": "config.ema.half_life is unknown; did you mean half_lives?",
    HEAD + "c.sampler.optoins = {'eta': 1}\n    return c": "config.sampler.optoins is unknown; did you mean options?",
    HEAD + "c.first_stage.wordkir = 'x'\n    return c": "config.first_stage.wordkir is unknown; did you mean workdir?",
    HEAD + "c.mesh.fspd = 2\n    return c": "config.mesh.fspd is unknown; did you mean fsdp?",
    HEAD + "c.split.valid = 'val'\n    return c": "config.split.valid is unknown",
    HEAD + "c.init_from.path = 'x'\n    return c": "config.init_from.path is unknown",
    HEAD + "c.train = {5: 3}\n    return c": "config.train.5 is unknown",
    HEAD + "c.task = 'diffusion'\n    return c": "line 6: TypeError: Could not override field 'task'",
    HEAD + "c.ema = None\n    return c": "config.ema=None; expected a block",
    HEAD + "c.ema.half_lives = None\n    return c": "config.ema.half_lives=None; expected a tuple of numbers",
    HEAD + "c.ema.half_lives = (5, 5.5)\n    return c": "config.ema.half_lives=(5, 5.5); expected no half-life twice",
    HEAD + "c.train = {'images': 'many'}\n    return c": "config.train.images='many'; expected a whole number",
    HEAD + "c.train = {'images': 1e6}\n    return c": "config.train.images=1000000.0; expected a whole number",
    HEAD + "c.train.batch_size = True\n    return c": "config.train.batch_size=True; expected a whole number",
    HEAD + "c.seed = -1\n    return c": "config.seed=-1; expected at least 0",
    HEAD + "c.seed = 2**64\n    return c": "config.seed=18446744073709551616; expected at most 18446744073709551615",
    HEAD + "c.ema.ramp = float('nan')\n    return c": "config.ema.ramp=nan; expected a finite number",
    HEAD + "c.train = {'images': 5,\n        'images': 6}\n    return c": "line 7: 'images' is twice in one block",
    HEAD + "del c.model.name\n    return c": "config.model.name is missing",
    HEAD + "c.input.resolution = 10**12\n    return c": "config.input.resolution=1000000000000; expected at most 4096",
}


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file_is_one_line(text, tmp_path):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        config_file.load(str(file))
    assert FILES[text] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--config.train.images=many"], "train.images"),
        (["--config.train.images=0"], "config.train.images=0; expected at least 1"),
        (["--config.train.images=5", "--config.train.images=6"], "--config.train.images is there twice"),
        (["--config.train={}"], "no key 'train'"),
        (["--config.sampler.options=5"], "sampler.options"),
        (["--config.ema.half_lives=x"], "ema.half_lives"),
        (["--config.ema.half_lives=(0,)"], "config.ema.half_lives=(0,); expected at least 1"),
        (["--config.input.flip=maybe"], "input.flip"),
    ],
)
def test_a_wrong_override_is_one_line(overrides, said):
    with pytest.raises(ValueError) as error:
        config_file.load("configs/quickstart.py", overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


ABSENT = {
    "model.dropout=0.1": ("model", "dropout", 0.1),
    "model.remat=true": ("model", "remat", True),
    "data.seed=2": ("data", "seed", 2),
    "optimizer.weight_decay=1": ("optimizer", "weight_decay", 1.0),
    "task.stratified=False": ("task", "stratified", False),
    "text.mlp_ratio=2": ("text", "mlp_ratio", 2.0),
}


def test_an_override_may_name_an_argument_that_the_file_leaves_out():
    """The config holds that key more, and no other: a run's config is what its file and its command line spell out."""
    plain = config_file.load("configs/quickstart.py")
    for word, (block, key, expected) in ABSENT.items():
        assert key not in plain[block], word
        config = config_file.load("configs/quickstart.py", [f"--config.{word}"], blocks.arguments)
        assert config[block][key] == expected and type(config[block][key]) is type(expected)
        with config.unlocked():
            del config[block][key]
        assert config == plain


def test_an_override_may_name_an_argument_of_an_overridden_constructor():
    words = ["--config.process.s=0.02", "--config.process.name=vp_cosine", "--config.seed=3"]
    config = config_file.load("configs/quickstart.py", words, blocks.arguments)
    assert config.process.to_dict() == {"name": "vp_cosine", "s": 0.02} and config.seed == 3
    vae = ["--config.task.adversarial.start_images=8", "--config.task.adversarial.optimizer.b1=0.5"]
    config = config_file.load("configs/quickstart_vae.py", vae, blocks.arguments)
    assert config.task.adversarial.to_dict() == {"start_images": 8, "optimizer": {"b1": 0.5}}
    check.check(config)


@pytest.mark.parametrize(
    "words, options",
    [
        (["sampler.name=ddim", "sampler.options.eta=1"], {"options": {"eta": 1.0}}),
        (["sampler.options={'snr': 0.2}", "sampler.name=predictor_corrector"], {"options": {"snr": 0.2}}),
        (["sampler.grid_options.rho=5", "sampler.grid=karras"], {"grid_options": {"rho": 5.0}}),
        (["sampler.guidance_method=apg", "sampler.guidance_options.eta=0"], {"guidance_options": {"eta": 0.0}}),
    ],
)
def test_options_of_the_sampler_are_set_one_by_one_or_whole(words, options):
    config = config_file.load("configs/quickstart.py", [f"--config.{word}" for word in words], blocks.arguments)
    for key, expected in options.items():
        assert config.sampler[key].to_dict() == expected


def test_options_that_a_file_sets_are_replaced_whole_and_added_to(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        HEAD + "c.sampler.update(name='annealed_langevin', options={'steps': 3, 'step_size': 0.1})\n    return c"
    )

    def options(*words):
        return config_file.load(
            str(file), [f"--config.sampler.{word}" for word in words], blocks.arguments
        ).sampler.options

    assert options("options.steps=7").to_dict() == {"steps": 7, "step_size": 0.1}
    assert options("options={}", "options.steps=7").to_dict() == {"steps": 7}
    assert options("name=predictor_corrector", "options={}", "options.snr=0.1").to_dict() == {"snr": 0.1}
    with pytest.raises(ValueError, match=r"config\.sampler\.options\.snr is unknown; there are steps, step_size"):
        options("options.snr=0.1")
    with pytest.raises(ValueError, match=r"config\.sampler\.options=5; expected a block"):
        options("options=5")


@pytest.mark.parametrize(
    "word, said",
    [
        ("sampler.options.eta=0.1", "config.sampler.options.eta is unknown; there are final"),
        ("sampler.grid_options.strat=1", "config.sampler.grid_options.strat is unknown; did you mean start?"),
        ("model.droput=0.1", "no key 'model.droput'; did you mean model.dropout?"),
        ("process.shfit=2", "no key 'process.shfit'; did you mean process.shift?"),
        ("optimizer.nesterov=true", "no key 'optimizer.nesterov'"),
        ("model.dropout=much", "config.model.dropout='much'; expected a number"),
        ("model.dropout=1", "config.model.dropout=1.0; expected below 1"),
        ("text.mlp_ratio=0", "config.text.mlp_ratio=0.0; expected above 0"),
        ("train.image=5", "no key 'train.image'; did you mean train.images?"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_nearest_neighbour(word, said):
    with pytest.raises(ValueError) as error:
        config_file.load("configs/quickstart.py", [f"--config.{word}"], blocks.arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    file, base = tmp_path / "c.py", config_file.base()
    file.write_text(HEAD + "c.train = {'images': 64}\n    c.ema = {'half_lives': [7]}\n    del c.mesh\n    return c")
    config = config_file.load(str(file), ["--config.train.batch_size=16", "--config.sampler.options={'eta': 0.5}"])
    assert config.train.images == 64 and config.train.batch_size == 16 and config.train.keep == base.train.keep
    assert list(config.ema.half_lives) == [7] and config.ema.ramp == base.ema.ramp and config.mesh == base.mesh
    assert config.sampler.options.to_dict() == {"eta": 0.5}


def test_a_file_has_its_own_configs_beside_ours_and_leaves_nothing_behind(tmp_path):
    """`configs` of one project are not those of the next, and its modules do not stand before jax's for the rest of the program."""
    before = list(sys.path), {name for name in sys.modules if name.startswith("configs")}
    for name, images in (("a", 5), ("b", 6)):
        folder = tmp_path / name / "configs"
        folder.mkdir(parents=True)
        (folder / "shared_part.py").write_text(f"IMAGES = {images}")
        (folder / "c.py").write_text(
            "from configs import base, shared_part\n"
            "def get_config(arg=''):\n    c = base.get_config()\n    c.train.images = shared_part.IMAGES\n    return c"
        )
        assert config_file.load(f"{folder}/c.py").train.images == images
    assert before == (list(sys.path), {name for name in sys.modules if name.startswith("configs")})
    (folder / "__init__.py").write_text("")
    with pytest.raises(ValueError, match=r"b/configs/__init__\.py hides this project's configs"):
        config_file.load(f"{folder}/c.py")
