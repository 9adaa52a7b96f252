"""Our Inception features, and the figures made of them, against torch-fidelity's: random weights, the same images.

On the same features figures agree to 1e-6; on each one's own features, in float32, to what KID and FID make of 1e-6 there.
SSIM against scikit-image.
"""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation import features, frechet, inception_score, kid, precision_recall, psnr, ssim, statistics
from ldm_jax.models.inception import FEATURES

pytestmark = [pytest.mark.oracle, pytest.mark.slow]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, torchvision_operators):
    """Random weights under torch-fidelity's names, scaled so that activations stay near 1 through all layers."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Unloaded(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    state = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
            # The last layers on the scale of the published network's, whose features are about 0.4.
            if name.startswith("Mixed_7c") and name.endswith("bn.weight"):
                value.mul_(0.3)
        elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
            value.normal_(0, 0.1, generator=generator)
        elif name == "fc.weight":
            value.normal_(0, 2048**-0.5, generator=generator)
    torch.save(state, path)
    return str(path)


def images(seed, n, height, width=None):
    """Coloured gradients with noise, u8[n, height, width, 3]: neither constant nor white."""
    generator = np.random.default_rng(seed)
    width = width or height
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    a, b, c = generator.uniform(-1, 1, (3, n, 1, 1, 3))
    wave = np.sin(6 * (a * x[..., None] + b * y[..., None] + c)) * 90 + 128
    return np.clip(wave + generator.normal(0, 25, wave.shape), 0, 255).astype(np.uint8)


def their_features(weights, pixels, names):
    """By name; 'spatial', which torch-fidelity has not, is read off its network where ADM's evaluator reads its own."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    own = [name for name in names if name != "spatial"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", own, feature_extractor_weights_path=weights)
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out[:, :7].permute(0, 2, 3, 1)))
    with torch.no_grad():
        out = [network(torch.from_numpy(part.transpose(0, 3, 1, 2).copy())) for part in np.array_split(pixels, 4)]
    found = {name: np.concatenate([o[i].numpy() for o in out]) for i, name in enumerate(own)}
    return found | {"spatial": torch.cat(spatial).flatten(1).numpy()}


@pytest.mark.parametrize("shape", [(32, 32), (128, 128), (299, 299), (400, 310)], ids=str)
def test_features(weights, shape):
    pixels = images(shape[0], 4, *shape)
    theirs = their_features(weights, pixels, FEATURES)
    for name in FEATURES if shape == (32, 32) else ("2048",):
        extractor = features.inception(weights, feature=name, batch=3)  # 4 images: the last batch is padded
        ours = extractor.apply(pixels)
        assert ours.shape == (4, extractor.dim) and ours.dtype == np.float32
        scale = np.abs(theirs[name]).max(1, keepdims=True)
        assert 1e-3 < scale.min() and scale.max() < 1e3, "the weights do not test anything"
        assert theirs[name].std(0).mean() > 1e-3 * scale.mean(), "the features do not depend on the image"
        print(f"{shape} {name}: relative error {np.max(np.abs(ours - theirs[name]) / scale):.2e}")
        assert np.max(np.abs(ours - theirs[name]) / scale) < 1e-4


def test_resize_is_bit_exact(torchvision_operators):
    import jax
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    from ldm_jax.models.inception import resize

    for shape in [(32, 32), (64, 48), (128, 128), (512, 300)]:
        pixels = images(1, 2, *shape).astype(np.float32)
        theirs = interpolate_bilinear_2d_like_tensorflow1x(
            torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), size=(299, 299), align_corners=False
        )
        # A compiler may contract a product and a sum into one rounding: one unit in the last place of 255.
        np.testing.assert_allclose(jax.jit(resize)(pixels), theirs.numpy().transpose(0, 2, 3, 1), rtol=0, atol=6e-5)


SETS = [images(1, 48, 32), np.clip(images(2, 48, 32) * 0.95 + 5, 0, 255).astype(np.uint8)]


@pytest.fixture(scope="module")
def ours(weights):
    """The outputs of our network by name, for the two sets of images."""
    extractor = features.inception(weights, batch=24)
    return [extractor.outputs(pixels) for pixels in SETS]


def fid(x, y):
    a, b = (statistics.gaussian(statistics.update(statistics.empty(f.shape[1]), f)) for f in (x, y))
    return frechet.distance(a.mean, a.covariance, b.mean, b.covariance)


def test_figures_of_the_same_features(torchvision_operators):
    """Every figure of torch-fidelity's that is computed in float64, within 1e-6."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(64, 64)) / 8
    made, real = np.abs(generator.normal(0.3, 1, (500, 64)) @ mixing), np.abs(generator.normal(size=(400, 64)) @ mixing)
    x, y = torch.from_numpy(made), torch.from_numpy(real)

    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    close = {"fid": (fid(made, real), expected["frechet_inception_distance"])}
    expected = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=200, verbose=False)
    found = kid.kid(made, real, subsets=20, subset_size=200)
    close["kid"] = found.mean, expected["kernel_inception_distance_mean"]
    close["kid_std"] = found.std, expected["kernel_inception_distance_std"]
    expected, found = isc_features_to_metric(3 * x), inception_score.inception_score(3 * made)
    close["is"] = found.mean, expected["inception_score_mean"]
    close["is_std"] = found.std, expected["inception_score_std"]
    expected = prc_features_to_metric(x, y, verbose=False)
    found = precision_recall.precision_recall(real, made)
    close |= {name: (getattr(found, name), expected[name]) for name in ("precision", "recall")}
    for name, (mine, theirs) in close.items():
        print(f"{name} {mine:.9g}, torch-fidelity {theirs:.9g}: {abs(mine / theirs - 1):.1e}")
        assert mine == pytest.approx(theirs, rel=1e-6), name
    assert 0 < close["recall"][0] < 1 and 0 < close["precision"][0] < 1 and close["fid"][0] > 0.1


def test_end_to_end(weights, ours, tmp_path):
    """torch_fidelity.calculate_metrics on folders of PNGs, which decodes, resizes and extracts by itself."""
    from torch_fidelity import calculate_metrics

    for name, pixels in zip(("made", "real"), SETS):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(tmp_path / name / f"{i:03d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        feature_extractor="inception-v3-compat",  # VGG for precision and recall otherwise
        feature_extractor_weights_path=weights,
        **dict.fromkeys(("isc", "fid", "kid", "prc", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subsets=10,
        kid_subset_size=40,
    )
    made, real = (o["features"] for o in ours)
    score = inception_score.inception_score(ours[0]["logits"])
    distance = kid.kid(made, real, subsets=10, subset_size=40)
    manifold = precision_recall.precision_recall(real, made)
    close = {
        # Of 48 images and 2048 features, with their square root of a singular product.
        "frechet_inception_distance": (fid(made, real), 3e-4),
        "kernel_inception_distance_mean": (distance.mean, 3e-4),
        "kernel_inception_distance_std": (distance.std, 3e-4),
        "inception_score_mean": (score.mean, 1e-6),
        "inception_score_std": (score.std, 1e-5),
        "precision": (manifold.precision, 1 / 48 + 1e-6),
        "recall": (manifold.recall, 1 / 48 + 1e-6),
    }
    for name, (mine, tolerance) in close.items():
        print(f"{name} {mine:.7g}, torch-fidelity {theirs[name]:.7g}: {abs(mine / theirs[name] - 1):.1e}")
        assert mine == pytest.approx(theirs[name], rel=tolerance), name
    assert theirs["frechet_inception_distance"] > 0.1


def test_sfid(weights, ours):
    """Of ADM's features, flattened in its order; in another order the distance is the same."""
    theirs = [their_features(weights, pixels[:16], ("768",))["spatial"] for pixels in SETS]
    mine = [o["spatial"][:16] for o in ours]
    for a, b in zip(mine, theirs):
        assert a.shape == (16, 2023) and b.std(0).mean() > 1e-2
        print(f"spatial: relative error {np.abs(a - b).max() / np.abs(b).max():.1e}")
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    value, expected = fid(*mine), fid(*theirs)
    print(f"sFID {value:.7g}, of torch-fidelity's network {expected:.7g}")
    assert value == pytest.approx(expected, rel=1e-5) and expected > 0.1
    order = np.random.default_rng(0).permutation(2023)
    assert fid(*(t[:, order] for t in theirs)) == pytest.approx(expected, rel=1e-9)


def test_ssim():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = images(3, 3, 40, 29), images(4, 3, 40, 29)
    noisy = np.clip(x + np.random.default_rng(0).normal(0, 9, x.shape), 0, 255).astype(np.uint8)
    for a, b in ((x, noisy), (x, y)):
        expected = [
            metrics.structural_similarity(
                *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
            )
            for pair in zip(a, b)
        ]
        np.testing.assert_allclose(ssim.ssim(a, b), expected, rtol=1e-9)
        np.testing.assert_allclose(
            psnr.psnr(a, b), [metrics.peak_signal_noise_ratio(*pair) for pair in zip(a, b)], rtol=1e-9
        )
