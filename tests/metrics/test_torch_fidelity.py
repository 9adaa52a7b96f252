"""Our Inception features, and the figures made of them, against torch-fidelity's: random weights, the same images."""

import numpy as np
import pytest

from ldm_jax.evaluation import features, frechet, inception_score, kid, precision_recall, statistics
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
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", list(names), feature_extractor_weights_path=weights)
    with torch.no_grad():
        out = [network(torch.from_numpy(part.transpose(0, 3, 1, 2).copy())) for part in np.array_split(pixels, 4)]
    return {name: np.concatenate([o[i].numpy() for o in out]) for i, name in enumerate(names)}


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


@pytest.fixture(scope="module")
def both(weights):
    """(ours, theirs): features of two sets of images by name, each from its own pixels."""
    sets = [images(1, 48, 32), np.clip(images(2, 48, 32) * 0.95 + 5, 0, 255).astype(np.uint8)]
    extractor = features.inception(weights, batch=24)
    ours = [{"2048": extractor.apply(s)} for s in sets]
    ours[0]["logits_unbiased"] = features.inception(weights, feature="logits_unbiased", batch=24).apply(sets[0])
    return ours, [their_features(weights, s, ("2048", "logits_unbiased")) for s in sets]


def test_fid(both):
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours, theirs = both
    expected = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(t["2048"])) for t in theirs), verbose=False
    )["frechet_inception_distance"]
    a, b = (statistics.gaussian(statistics.update(statistics.empty(2048), o["2048"])) for o in ours)
    value = frechet.distance(a.mean, a.covariance, b.mean, b.covariance)
    print(f"FID {value:.6f}, torch-fidelity {expected:.6f}")
    assert expected > 0.1
    assert abs(value - expected) < 1e-3


def test_kid_score_and_precision(both):
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    ours, theirs = both
    x, y = (torch.from_numpy(t["2048"]) for t in theirs)
    expected = kid_features_to_metric(x, y, kid_subsets=10, kid_subset_size=40, verbose=False)
    found = kid.kid(ours[0]["2048"], ours[1]["2048"], subsets=10, subset_size=40)
    scale = expected["kernel_inception_distance_mean"]
    np.testing.assert_allclose(found.mean, scale, rtol=1e-3)
    np.testing.assert_allclose(found.std, expected["kernel_inception_distance_std"], rtol=1e-2)

    expected = isc_features_to_metric(torch.from_numpy(theirs[0]["logits_unbiased"]))
    found = inception_score.inception_score(ours[0]["logits_unbiased"])
    np.testing.assert_allclose(found.mean, expected["inception_score_mean"], rtol=1e-5)
    np.testing.assert_allclose(found.std, expected["inception_score_std"], rtol=1e-3)

    generated, real = x, y
    precision, recall = calculate_precision_recall_part(generated, real)
    found = precision_recall.precision_recall(ours[1]["2048"], ours[0]["2048"])
    print(found, precision, recall)
    np.testing.assert_allclose([found.precision, found.recall], [precision, recall], atol=1 / 48 + 1e-6)
