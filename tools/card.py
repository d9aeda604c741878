"""Draw nbs/assets/card.png, which other sites show beside a link to this one: noise becoming the ring."""
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from lfdm.data import DATASETS
from lfdm.schedules import SCHEDULES

ring, schedule = DATASETS["ring"](), SCHEDULES["cosine"]()
levels = torch.tensor([-2, 0.5, 2, 4, 12.9])
times = schedule.t(levels)
x = ring.sample(3000, seed=0)
noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#0b2a4a")
fig.text(0.05, 0.83, "lfdm", color="white", fontsize=54, weight="bold")
fig.text(0.05, 0.73, "Loss functions in diffusion models", color="white", fontsize=30)
fig.text(0.05, 0.13, "target  ×  weighting  ×  schedule:", color="#9fd0ff", fontsize=21)
fig.text(0.05, 0.06, "each loss derived, implemented, and measured against an exact floor",
         color="#9fd0ff", fontsize=21)
for i, t in enumerate(times):
    ax = fig.add_axes([0.03 + 0.19 * i, 0.24, 0.18, 0.42])
    z = schedule.alpha(t) * x + schedule.sigma(t) * noise
    ax.scatter(*z.T, s=1.5, color="#f5b041", linewidth=0)
    ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    ax.axis("off")
file = Path(__file__).parent.parent / "nbs" / "assets" / "card.png"
fig.savefig(file, facecolor=fig.get_facecolor())
Image.open(file, formats=["PNG"]).convert("RGB").quantize(64).save(file, optimize=True)
