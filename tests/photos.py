"Small folders of images, and runs on them."
from pathlib import Path

import numpy as np
from PIL import Image

# 4 steps an epoch, the last of 5 images
TINY = dict(dataset="folder", network="small(width=2, multipliers='1', halvings=0, mid=0)", epochs=3,
            batch_size=15, lr=1e-3, warmup=5, ema=.9, n_samples=10, sample_steps=2, judged=6)


def numbered(n=60, first=0):
    "File names. A sixth of such images is for testing; without labels, no classifier is trained on them."
    return " ".join(f"{i:03}.png" for i in range(first, first + n))


def write(folder, names, size=(8, 8), mode="RGB", seed=0, **options):
    "Random images of these names; the folder."
    rng, folder = np.random.default_rng(seed), Path(folder)
    for file in map(folder.joinpath, names.split()):
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(file, **options)
    return folder
