"""`ldm generate` from the outside: pictures with their settings in them, and one clear line for what is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ldm_jax import cli  # noqa: E402
from tests.pipelines import published as tiny  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    pipeline = diffusers.StableDiffusionPipeline(
        unet=tiny.unet(), scheduler=diffusers.DDIMScheduler(**tiny.DDIM), **tiny.sd_parts()
    )
    pipeline.save_pretrained(path / "model")
    picture = Image.fromarray((tiny.picture()[0] * 255).astype(np.uint8))
    for name, size in (("picture", (16, 16)), ("wide", (20, 16)), ("odd", (19, 17))):
        picture.resize(size).save(path / f"{name}.png")
    np.save(path / "rows.npy", np.zeros((8, 8, 4), np.float32))
    np.save(path / "nan.npy", np.full((1, 8, 8, 4), np.nan, np.float32))
    return path


def test_pictures_carry_their_settings_and_numbers_go_on(folder, tmp_path, capsys):
    words = ["generate", f"--model={folder / 'model'}", "--steps=2", "--quiet", f"--out={tmp_path}"]
    asked = ["--prompt=a (red:1.2) fox", "--prompt=dög", "--negative=no", "--guidance=3", "--seed=4", "--num=3"]
    assert cli.main([*words, *asked, "--keep-latents"]) == 0
    assert "3 images" in capsys.readouterr().out
    image = Image.open(tmp_path / "000001.png")
    assert image.size == (16, 16)
    assert image.text["prompt"] == "dög" and image.text["seed"] == "4"
    settings = json.loads(image.text["settings"])
    assert settings["index"] == 1 and settings["guidance"] == 3 and settings["sampler"] == "ddim"
    assert np.load(tmp_path / "000002.npy").shape == (1, 8, 8, 4)
    before = (tmp_path / "000000.png").read_bytes()
    assert cli.main([*words, "--prompt=a", f"--init-image={folder / 'picture.png'}", "--strength=0.7"]) == 0
    assert (tmp_path / "000003.png").exists() and (tmp_path / "000000.png").read_bytes() == before
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "words, shape",
    [
        (["--prompt=a", "--init-image={picture}", "--mask={picture}", "--strength=0.6"], (16, 16)),
        (["--prompt=a", "--init-image={picture}", "--vary=b"], (16, 16)),
        (["--prompt=a", "--to-prompt=b", "--to-seed=3", "--num=2", "--size=24x16"], (24, 16)),
        (["--prompt=a", "--tile=16", "--size=34x38", "--rescale=0.5"], (34, 38)),
        (["--prompt=a", "--sampler=euler", "--grid=karras"], (16, 16)),
        (
            ["--prompt=a", "--guidance-method=apg:eta=0", "--guidance-schedule=cosine", "--guidance-interval=0.1,0.9"],
            (16, 16),
        ),
    ],
    ids=["mask", "vary", "between", "tiles", "grid", "guidance"],
)
def test_ways_of_drawing(folder, tmp_path, words, shape):
    words = [word.format(picture=folder / "picture.png") for word in words]
    assert (
        cli.main(["generate", f"--model={folder / 'model'}", "--steps=4", "--quiet", f"--out={tmp_path}", *words]) == 0
    )
    assert Image.open(tmp_path / "000000.png").size == shape[::-1]


def test_lists_draw_the_same_seeds_side_by_side(folder, tmp_path):
    """Two scales and two samplers, one with an option: each cell is the picture that its values draw alone; rows are labelled."""
    words = ["generate", f"--model={folder / 'model'}", "--steps=3", "--quiet", "--prompt=a", "--seed=2"]
    assert cli.main([*words, f"--out={tmp_path / 'all'}", "--guidance=1,6", "--sampler=ddim:eta=0.5,euler"]) == 0
    pictures = [np.asarray(Image.open(tmp_path / "all" / f"{i:06d}.png")) for i in range(4)]
    assert not (tmp_path / "all" / "000004.png").exists() and len({p.tobytes() for p in pictures}) == 4
    assert cli.main([*words, f"--out={tmp_path / 'one'}", "--guidance=6", "--sampler=ddim:eta=0.5"]) == 0
    assert (pictures[1] == np.asarray(Image.open(tmp_path / "one" / "000000.png"))).all()
    said = json.loads(Image.open(tmp_path / "all" / "000001.png").text["settings"])
    assert said["guidance"] == 6 and said["sampler"] == "ddim" and said["options"] == {"eta": 0.5}
    whole, alone = (Image.open(tmp_path / name / "grid.png") for name in ("all", "one"))
    assert 1.9 < whole.width / alone.width < 2.1 and whole.height > 1.9 * alone.height, "two by two, with labels"
    assert alone.height > alone.width, "the prompt stands below"


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--prompt: StableDiffusionPipeline needs one"),
        (["--prompt=a", "--guidance-method=apg:etta=1"], "guidance method 'apg' has no option 'etta'; it has eta"),
        (["--prompt=a", "--guidance-interval=0.5"], "--guidance-interval=0.5; expected LO,HI"),
        (["--prompt=a", "--threshold=static"], "this model draws latents"),
        (["--prompt=a", "--guidance=1", "--guidance-method=apg"], "--guidance-method does nothing with --guidance=1"),
        (["--prompt=a", "--guidance=2,2"], "--guidance: a value stands there twice"),
        (["--prompt=a", "--ema=none"], "--ema=none goes with a run of `ldm train`"),
        (["--prompt=a", "--sampler=foo"], "--sampler=foo is unknown"),
        (["--prompt=a", "--steps=0"], "--steps=0; expected at least 1"),
        (["--prompt=a", "--size=17"], "multiples of 2; the nearest is (16, 16)"),
        (["--prompt=a", "--size=big"], "--size=big; expected HxW"),
        (["--prompt=a", "--mask=m.png"], "--mask=m.png needs --init-image"),
        (["--prompt=a", "--init-image=none.png"], "--init-image=none.png: no such file"),
        (["--prompt=a", "--init-image={model}/model_index.json"], "not a picture"),
        (["--prompt=a", "--init-image={picture}", "--strength=1.5"], "--strength=1.5; expected a number in (0, 1]"),
        (["--prompt=a", "--latents={picture}"], "not an .npy file of numbers"),
        (["--prompt=a", "--depth={picture}", "--init-image={picture}"], "takes no depth"),
        (["--prompt=a", "--init-image={picture}", "--strength=0"], "--strength=0.0; expected a number in (0, 1]"),
        (["--prompt=a", "--image-guidance=2"], "--image-guidance does nothing for text by StableDiffusionPipeline"),
        (["--prompt=a", "--label=3"], "--label does nothing for text"),
        (["--prompt=a", "--guidance=1", "--negative=b"], "--negative does nothing with --guidance=1"),
        (["--prompt=a", "--guidance=0", "--rescale=0.5"], "--rescale does nothing with --guidance=0: at most 1 means"),
        (["--prompt=a", "--guidance=nan"], "--guidance is nan; expected a number of at most 1000"),
        (["--prompt=a", "--guidance=1e39"], "expected a number of at most 1000"),
        (["--prompt=a", "--rescale=1.5"], "--rescale is 1.5; expected a number in [0, 1]"),
        (["--prompt=a", "--init-image={picture}", "--strength=nan"], "--strength=nan; expected a number in (0, 1]"),
        (["--prompt=a", "--latents={root}/nan.npy"], "holds NaN or infinite values"),
        (["--prompt=a", "--latents={root}/rows.npy"], "has shape (8, 8, 4), expected [N or 1, h, w, C]"),
        (
            ["--prompt=a", "--init-image={picture}", "--mask={root}/wide.png"],
            "the mask has 16 x 20 pixels, its picture 16 x 16",
        ),
        (["--prompt=a", "--prompt=b", "--num=1"], "--num=1, but 2 prompts"),
        (["--prompt=a", "--vary=b", "--sampler=euler_ancestral", "--init-image={picture}"], "draws noise"),
        (
            ["--prompt=a", "--seed=18446744073709551616"],
            "--seed=18446744073709551616; expected a whole number from 0 to 2**64 - 1",
        ),
        (["--prompt=a", "--tokenizer=x"], "tokenizer is for single files"),
        (["--prompt=a", "--to-seed=1", "--init-image={picture}"], "--to-prompt and --to-seed go with one --prompt"),
        (["--prompt=a", "--classifier=x"], "--classifier=x goes with a run of `ldm train`"),
        (["--model=none", "--prompt=a"], "none: expected a pipeline's folder"),
        (["--model=hub:none", "--prompt=a"], "expected hub:OWNER/NAME"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, words, said):
    places = {"model": folder / "model", "picture": folder / "picture.png", "root": folder}
    words = [word.format(**places) for word in words]
    out = tmp_path / "out"
    assert cli.main(["generate", f"--model={folder / 'model'}", "--quiet", f"--out={out}", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("ldm generate: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "words, shape, said",
    [
        ([], (16, 18), "of the picture of 17 x 19 pixels the middle 16 x 18 is taken: sizes are multiples of 2"),
        (["--mask={root}/odd.png"], (16, 18), "the middle 16 x 18 is taken"),
        (["--size=8x16"], (8, 16), "the picture of 17 x 19 pixels is scaled, and its middle cut to 8 x 16"),
    ],
)
def test_what_is_cut_off_a_picture_is_said(folder, tmp_path, words, shape, said):
    words = [word.format(root=folder) for word in [*words, "--init-image={root}/odd.png", "--prompt=a", "--steps=2"]]
    with pytest.warns(UserWarning, match=said):
        assert cli.main(["generate", f"--model={folder / 'model'}", f"--out={tmp_path}", "--quiet", *words]) == 0
    assert Image.open(tmp_path / "000000.png").size == shape[::-1]


def test_an_image_that_is_not_finite_is_named_and_the_others_are_kept(folder, tmp_path, monkeypatch, capsys):
    latents = np.zeros((3, 8, 8, 4), np.float32)
    latents[1, 2, 3] = np.inf
    monkeypatch.setattr("ldm_jax.cli.generate.draw", lambda *args: latents)
    words = ["--prompt=a", "--num=3", "--keep-latents", f"--out={tmp_path / 'out'}"]
    assert cli.main(["generate", f"--model={folder / 'model'}", *words]) == 1
    assert "image 1 of 3 came out NaN or infinite and is not written; 2 are" in capsys.readouterr().err
    names = ["000000.npy", "000000.png", "000002.npy", "000002.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
