"""The mark to beat: a class-conditional diffusers U-Net of 2.5M parameters, trained on CIFAR-10 pixels for 20 minutes on two cores.

    .venv/bin/python -m experiments.cifar10_cpu.peer --minutes=20 --num=2000 --out=runs/cifar10_peer
    ldm evaluate --workdir=runs/cifar10_ldm_dit --metrics=fid,accuracy --features=classifier:runs/cifar10_classifier \\
        --samples=runs/cifar10_peer/samples.npz

DDPM's objective (Ho et al. 2020, eq. 14) with a cosine schedule, AdamW, EMA, DDIM-50 (Song et al. 2021), as diffusers' own training
example has them. It needs requirements-test.txt (torch, diffusers), which nothing in ldm_jax does; the images come through
ldm_jax's data, so that the split is the same.
"""

import argparse
import copy
import json
import pathlib
import time

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ldm_jax.data import SOURCES, contact_sheet

CLASSES = 10


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 48, 64, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
        num_class_embeds=CLASSES,
    ).to(memory_format=torch.channels_last)  # a quarter faster on a CPU


def train(images: torch.Tensor, labels: torch.Tensor, minutes: float, batch: int, seed: int) -> tuple[UNet2DModel, int]:
    """EMA of a network trained for that long on u8[N, 3, H, W], flipped at random; and how many images it saw."""
    torch.manual_seed(seed)
    net = network()
    average = copy.deepcopy(net).eval().requires_grad_(False)
    schedule = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    seen, begun, losses = 0, time.time(), []
    order = torch.randperm(len(images))
    while (spent := time.time() - begun) < 60 * minutes:
        if (seen % len(order)) + batch > len(order):
            order, seen = torch.randperm(len(images)), seen + len(order) - seen % len(order)
        rows = order[seen % len(order) :][:batch]
        x = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        flip = torch.rand(len(x)) < 0.5
        x[flip] = x[flip].flip(-1)
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        rate = 5e-4 * min(1.0, (seen + batch) / 4000) * 0.5 * (1 + np.cos(np.pi * spent / (60 * minutes)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        output = net(schedule.add_noise(x, eps, t), t, class_labels=labels[rows]).sample
        loss = torch.nn.functional.mse_loss(output, eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seen += batch
        decay = min(0.998, (1 + seen / batch) / (10 + seen / batch))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), net.parameters()):
                slow.lerp_(fast, 1 - decay)
        losses.append(loss.item())
        if len(losses) == 50:
            print(f"{spent / 60:5.1f} min  {seen:7d} images  loss {np.mean(losses):.4f}", flush=True)
            losses = []
    return average, seen


@torch.no_grad()
def sample(net: UNet2DModel, labels: torch.Tensor, steps: int, batch: int, seed: int) -> np.ndarray:
    """u8[N, H, W, 3], one of each label, by DDIM."""
    generator = torch.Generator().manual_seed(seed)
    schedule = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    schedule.set_timesteps(steps)
    done = []
    for start in range(0, len(labels), batch):
        y = labels[start : start + batch]
        x = torch.randn(len(y), 3, 32, 32, generator=generator)
        for t in schedule.timesteps:
            x = schedule.step(net(x, t, class_labels=y).sample, t, x).prev_sample
        done.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of training (20)")
    parser.add_argument("--num", type=int, default=2000, help="images, equally many of each class (2000)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/cifar10_peer", metavar="DIR")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    source = SOURCES["zip"](path="cifar10_jpeg.zip", split="train", val_from_train=500)
    rows = [source[i] for i in range(len(source))]
    images = torch.from_numpy(np.stack([r["image"] for r in rows])).permute(0, 3, 1, 2)
    net, seen = train(images, torch.tensor([int(r["label"]) for r in rows]), args.minutes, args.batch, args.seed)
    net.save_pretrained(out / "unet")
    labels = torch.arange(args.num) % CLASSES
    begun = time.time()
    drawn = sample(net, labels, 50, 100, args.seed)
    np.savez(out / "samples.npz", arr_0=drawn, labels=labels.numpy().astype(np.int32))
    contact_sheet.save(out / "grid.png", drawn[:100], columns=CLASSES)
    record = {"images": seen, "minutes": args.minutes, "sampling_seconds": round(time.time() - begun), "num": args.num}
    (out / "peer.json").write_text(json.dumps(record | {"torch": torch.__version__, "seed": args.seed}) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
