"""How fast is a training step of the UNet? Ratios in one run, on the machine it runs on.

    .venv/bin/python benchmarks/images.py             # about three minutes; writes benchmarks/images.md
    .venv/bin/python benchmarks/images.py --compile   # also torch.compile: minutes for a network on a CPU
                                                      # (on a GPU it is always measured)

Whole steps are measured (forward, mean squared error, backward, fused Adam), float32 on a CPU and bfloat16
autocast on a GPU, contiguous and channels_last:

- lfdm's UNet;
- diffusers' UNet2DModel: the same multipliers, layers and attention. Its up blocks have one resnet block
  more, and a skip for each;
- denoising-diffusion-pytorch's Unet: the same multipliers, two resnet blocks a level down and up, and
  attention in every level (linear, full in the last), which cannot be turned off. Nothing else needs it:
  pip install --no-deps denoising-diffusion-pytorch einops ema-pytorch. Without it the table leaves it out.

The peers get the width that gives lfdm's number of parameters, within 5 %. Parameters are not operations, so
the table counts both. The last column says how near a step comes to the arithmetic alone: its counted
operations at the speed of the fastest matrix product, measured in the same round. The contestants take
turns, round by round; the table has the medians.
"""
import argparse
import importlib
import math
import platform
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lfdm.images.unet import unet

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDS = 7
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SETTINGS = {  # title -> network, channels, size, (batch, steps a round) on a CPU, the same on a GPU
    "small": ("small", 1, 16, (64, 8), (512, 50)),
    "middle": ("small(width=32, multipliers='1, 2, 4, 4', halvings=3)", 3, 32, (16, 2), (256, 50)),
}
if ON_GPU: SETTINGS["ddpm"] = ("ddpm", 3, 32, None, (128, 10))


# ---- the networks

def parameters(net): return sum(p.numel() for p in net.parameters())


def diffusers(options, width, spare):
    "net(z, u) of another width; its time embedding has `spare` times our width."
    from diffusers import UNet2DModel

    class Net(UNet2DModel):
        def forward(self, z, u): return super().forward(z, 1000 * u).sample

    blocks, attention = len(options["multipliers"]), options["attention"]
    attended = {"all": range(blocks), "mid": (), "none": ()}.get(attention, attention)
    kinds = ["Attn" * (i in attended) for i in range(blocks)]
    widths = tuple(width * m for m in options["multipliers"])
    return Net(
        in_channels=options["channels"],
        out_channels=options["channels"],
        block_out_channels=widths,
        layers_per_block=options["layers"],
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
        norm_num_groups=math.gcd(32, *widths),
        attention_head_dim=None,
        time_embedding_dim=spare * options["width"],
        add_attention=attention != "none")


def denoising(options, width, spare):
    "net(z, u) of another width; the one head of its attention has 8 × `spare` channels."
    from denoising_diffusion_pytorch import Unet

    class Net(Unet):
        def forward(self, z, u): return super().forward(z, 1000 * u)

    return Net(width, channels=options["channels"], dim_mults=options["multipliers"],
               attn_heads=1, attn_dim_head=8 * spare)


def fitted(build, options, target):
    "The network with the target's number of parameters within 5 %: of the roundest widths, the nearest."
    def distance(choice):
        with torch.device("meta"): return abs(parameters(build(options, *choice)) / target - 1)

    for unit in (8, 4, 2):
        choices = product(range(unit, 2 * options["width"], unit), (2, 3, 4, 6, 8))
        nearest = min(choices, key=distance)
        if distance(nearest) <= 0.05: return build(options, *nearest)
    raise RuntimeError(f"{build.__name__} has no width that gives {target:,} parameters within 5 %.")


def available_peers():
    "(name -> how to build it, what is missing in words)."
    peers = {"diffusers": diffusers, "denoising-diffusion-pytorch": denoising}
    try: importlib.import_module("denoising_diffusion_pytorch")
    except ImportError as error:
        del peers["denoising-diffusion-pytorch"]
        return peers, f" Left out: denoising-diffusion-pytorch ({error})."
    return peers, ""


# ---- what is measured

def seconds(run):
    "How long it takes, to the end of the device's work."
    if ON_GPU: torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if ON_GPU: torch.cuda.synchronize()
    return time.perf_counter() - began


def peak():
    "The speed of the fastest matrix product, in operations per second."
    n, dtype, times = (8192, torch.bfloat16, 20) if ON_GPU else (1024, torch.float32, 10)
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)

    def products():
        for _ in range(times): a @ b

    seconds(products)   # warms up
    return 2 * times * n**3 / seconds(products)


class Contestant:
    "A network with its optimizer; `step` trains it on one batch."
    def __init__(self, net, z, memory_format, compiled):
        self.net = net.to(DEVICE, memory_format=memory_format).train()
        self.run = torch.compile(self.net) if compiled else self.net
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-4, fused=True)
        self.z, self.u = z.contiguous(memory_format=memory_format), torch.rand(len(z), device=DEVICE)
        with FlopCounterMode(display=False) as counter: self.loss(self.net).backward()
        self.flops = counter.get_total_flops()
        self.first = seconds(self.step)
        self.steps(2)

    def loss(self, net):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            return (net(self.z, self.u).float() - self.z).square().mean()

    def step(self):
        self.optimizer.zero_grad()
        self.loss(self.run).backward()
        self.optimizer.step()

    def steps(self, n):
        for _ in range(n): self.step()


def contestants_of(words, channels, size, batch, peers, compiling):
    "Every network in every memory format, and compiled where that is asked for."
    torch.manual_seed(0)
    z = torch.randn(batch, channels, size, size, device=DEVICE)
    ours = partial(unet, words, channels, size)
    net = ours()
    builds = {"lfdm": ours}
    for name, build in peers.items(): builds[name] = partial(fitted, build, net.options, parameters(net))
    found = {f"{name}, {form}": Contestant(build(), z, FORMATS[form], False)
             for name, build in builds.items() for form in FORMATS}
    if not compiling: return found
    return found | {f"{name}, channels_last, compiled": Contestant(build(), z, torch.channels_last, True)
                    for name, build in builds.items()}


def raced(contestants, steps):
    "(name -> median seconds a step, the median speed of matrix products): the contestants take turns."
    times, limits = {name: [] for name in contestants}, []
    for _ in range(ROUNDS):
        limits.append(peak())
        for name, c in contestants.items(): times[name].append(seconds(partial(c.steps, steps)) / steps)
        print(".", end="", flush=True)
    return {name: statistics.median(t) for name, t in times.items()}, statistics.median(limits)


# ---- what is written

HEAD = """\
| | parameters | GFLOP a step | images/s | times diffusers | of the arithmetic's speed |
|---|---:|---:|---:|---:|---:|"""


def table(title, contestants, batch, steps):
    "Let the contestants race; a Markdown table of who was how fast."
    median, limit = raced(contestants, steps)
    reference = median["diffusers, contiguous"]

    def row(name, c):
        compiled = f" (first step {c.first:.0f} s)" if "compiled" in name else ""
        cells = (f"{name}{compiled}", f"{parameters(c.net):,}", f"{c.flops / 1e9:.2f}",
                 f"{batch / median[name]:.0f}", f"{reference / median[name]:.2f}",
                 f"{100 * c.flops / limit / median[name]:.0f} %")
        return f"| {' | '.join(cells)} |"

    rows = "\n".join(row(name, c) for name, c in contestants.items())
    return f"## {title}\n\n{HEAD}\n{rows}\n\nFastest matrix product: {limit / 1e9:.0f} GFLOP/s.\n"


def conditions():
    "How and where the steps were measured."
    if ON_GPU: return f"bfloat16 autocast, {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"float32, {threads} thread{'s' * (threads > 1)}, {platform.machine()}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    compiling = parser.parse_args().compile or ON_GPU
    peers, missing = available_peers()
    if missing: print(missing)
    tables = []
    for title, (words, channels, size, on_cpu, on_gpu) in SETTINGS.items():
        batch, steps = on_gpu if ON_GPU else on_cpu
        contestants = contestants_of(words, channels, size, batch, peers, compiling)
        heading = f"{title}: {size}×{size}×{channels}, batch {batch}"
        tables.append(table(heading, contestants, batch, steps))
    about = (f"Written by `benchmarks/images.py`: {conditions()}, torch {torch.__version__.split('+')[0]}; "
             f"medians of {ROUNDS} rounds, in turns. Only the ratios mean anything elsewhere.{missing}")
    text = "# Training steps of the UNet\n\n" + "\n".join(tables) + f"\n{about}\n"
    print("\n\n" + text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
