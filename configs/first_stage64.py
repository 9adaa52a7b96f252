"""First stages on 64 px photographs or emoji, f = 4, with the terms of the loss to choose (experiments/first_stage.py compares them).

    ldm train --config=configs/photos64_classifier.py --workdir=runs/photos64_classifier
    ldm train --config=configs/first_stage64.py --workdir=runs/photos64_kl
    ldm train --config=configs/first_stage64.py:emoji,vq,l1 --workdir=runs/emoji64_vq
    ldm evaluate --workdir=runs/photos64_kl --metrics=psnr,ssim,rfid --num=1000 --features=classifier:runs/photos64_judge

After the colon, in any order: photos or emoji, the images; kl or vq, the latent; l1, perceptual, adversarial or all, the loss (the
first of each is the default, of losses it is all); and smoke. The perceptual term sees with the classifier in runs/photos64_classifier
(--config.task.perceptual.name=classifier:DIR): a network trained here, not LPIPS.
By L1 Muon reaches 23.9 dB in 6k photographs where AdamW (2e-3) reaches 19.7.
Expected after 6k photographs with all terms: 24.1 dB, rfd_classifier 0.90. See experiments/first_stage/README.md.
"""

from configs import base


def get_config(arg: str = ""):
    chosen, smoke = base.choose(
        arg, data=("photos", "emoji"), latent=("kl", "vq"), loss=("all", "l1", "perceptual", "adversarial")
    )
    c = base.get_config("smoke" if smoke else "")
    c.task = {"name": "autoencoder", "reconstruction": "l1", "perceptual": {}, "adversarial": {}}
    if chosen["loss"] in ("perceptual", "all"):
        c.task.perceptual = {"name": "classifier:runs/photos64_classifier", "weight": 0.3}
    if chosen["loss"] in ("adversarial", "all"):
        c.task.adversarial = {
            "width": 16,
            "layers": 2,
            "norm": "group",
            "loss": "hinge",
            "weight": 0.3,
            "adaptive": True,
            "start_images": 8_000,
            "optimizer": {"name": "adamw", "learning_rate": 2e-3, "clip_norm": 0.0, "b1": 0.5},
        }
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    }
    if chosen["latent"] == "kl":
        c.task.kl_weight = 1e-4
    else:
        c.model.update(name="vq", num_vq_embeddings=1024)
        c.task.update(codebook_decay=0.98, revive_after=2_000)
    if chosen["data"] == "photos":
        c.data = {"name": "zip", "path": "caltech101_128.zip", "skip_broken": False}
    else:
        c.data = {"name": "zip", "path": "emoji128.zip", "skip_broken": False}
        c.split.report = "test_concept"
    c.input.update(resolution=64, crop="lanczos", flip=True, cache=True)
    c.optimizer = {
        "name": "muon",
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_images": 500,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (500,), "ramp": 0.05}
    c.train.update(images=16_000, batch_size=8, log_every=1_600, checkpoint_every=8_000, pictures=12)
    if smoke:
        base.smoke(c)
        c.input.update(resolution=32, cache=False)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4)
        c.task.perceptual = {}
        if c.task.adversarial:
            c.task.adversarial.update(width=4, start_images=16)
        if c.model.name == "vq":
            c.model.num_vq_embeddings = 32
    return c
