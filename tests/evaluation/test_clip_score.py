"""CLIP score and the features it is made of, against transformers' CLIPModel with its own tokenizer and image processor."""

import numpy as np
import pytest

from ldm_jax.evaluation import clip_score, features

PROMPTS = ["a red dog", "b", "a red dog", "the cat sat on the mat and then left", ""]


def test_score():
    x = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 3.0]], np.float32)
    y = np.array([[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], np.float32)
    result = clip_score.score(x, y)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, [100, 100 / np.sqrt(2), 0, 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\), expected twice the same"):
        clip_score.score(x, y[:3])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(transformers' model, its folder with a tokenizer, a folder of shards without)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.pipelines.published import LENGTH, stir, tokenizer

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "vocab_size": 64,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=24)
    result, folder = stir(transformers.CLIPModel(config)), tmp_path_factory.mktemp("clip")
    result.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    result.save_pretrained(folder / "shards", max_shard_size="40KB")
    return result, folder


@pytest.mark.oracle
def test_against_transformers(model):
    import torch
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from tests.pipelines.published import tokenizer

    theirs, folder = model
    images = np.random.default_rng(0).integers(0, 256, (5, 60, 50, 3), np.uint8)
    process = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    # The square first, so that both sides resize the same pixels.
    squares = [Image.fromarray(image).crop((0, 5, 50, 55)) for image in images]
    pixels = process(squares, return_tensors="pt")["pixel_values"]
    tokens = tokenizer()(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**tokens, pixel_values=pixels)
        image_embeds = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)

    extractor = features.named(f"clip:{folder}")
    assert (extractor.name, extractor.dim, extractor.resolution) == ("clip", 24, 32)
    ours, texts = extractor.apply(images), clip_score.text_embeds(folder, PROMPTS)
    assert texts.shape == (5, 24) and texts.dtype == np.float32
    np.testing.assert_allclose(ours, image_embeds.numpy(), rtol=0, atol=1e-5 * np.abs(image_embeds.numpy()).max())
    scale = np.exp(theirs.logit_scale.item())
    cosines = np.diag(expected.logits_per_image.numpy()) / scale
    assert cosines.std() > 0.01 and (cosines > 0).any()
    np.testing.assert_allclose(clip_score.score(ours, texts), 100 * np.maximum(cosines, 0), atol=1e-3)
    np.testing.assert_array_equal(texts[0], texts[2])


def test_shards_are_told_apart(model):
    _, folder = model
    parts = folder / "shards"
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(names) > 1
    whole, before = features.folder_sha256(folder), features.folder_sha256(parts)
    assert whole != before == features.folder_sha256(parts)
    content = bytearray((parts / names[-1]).read_bytes())
    content[-1] ^= 1
    (parts / names[-1]).write_bytes(content)
    assert features.folder_sha256(parts) != before


def test_refusals(model, tmp_path):
    from ldm_jax import weights

    _, folder = model
    module, params = weights.load(folder)
    weights.save(tmp_path / "text", module.text, params["text"])
    weights.save(tmp_path / "vision", module.vision, params["vision"])
    with pytest.raises(ValueError, match="holds a CLIPTextModelWithProjection, expected CLIPModel"):
        features.clip(tmp_path / "text")
    with pytest.raises(ValueError, match="holds a CLIPVisionModelWithProjection, expected CLIPModel"):
        clip_score.text_embeds(tmp_path / "vision", PROMPTS)
    with pytest.raises(ValueError, match=r"tokenizer .*expected vocab\.json"):
        clip_score.text_embeds(tmp_path / "text", PROMPTS)
    with pytest.raises(ValueError, match="holds a CLIP, expected a Dinov2Model"):
        features.dinov2(folder)
    assert features.clip(tmp_path / "vision").sha256 != features.clip(folder).sha256
