"A small folder of images, and runs on it."
from pathlib import Path

import numpy as np
from PIL import Image

# 4 steps an epoch, the last of 5 images
TINY = dict(dataset="folder", network="small(width=4)", epochs=3, batch_size=15, lr=1e-3, warmup=5, ema=.9,
            n_samples=10, sample_steps=2, judged=6)


def write_images(folder, n=60, size=8, seed=0, first=0):
    "Images without labels, so that no classifier is trained on them. A sixth is for testing."
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(first, first + n):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return str(folder)
