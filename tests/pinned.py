"""What no change of structure may change: names, reprs, first points, and small runs, bit for bit.

`python tests/pinned.py` writes the folder pinned/ anew.
Do so only with a new RESULTS_VERSION, or to add entries.

Processors that call themselves alike may differ in the last bit of a sum. `python tests/pinned.py bits` adds
what the runs are on this one. Do so with code that is known to be good, from before a change.
"""
import hashlib
import inspect
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "pinned"

# Of each option another value than its default. Numbers that `:g` cannot hold are among them.
OPTIONS = dict(
    schedule=dict(logsnr_min=-7.25, logsnr_max=8.123456789, shift=0.1 + 0.2, beta_min=2e-4, beta_max=25.,
                  mean=1.7, std=2.1, rho=5.5, m=0.3, s=1.1, bins=50,
                  decay=0.95, uniform=0.2, moment=2, schedule="linear", T=500, beta="cosine"),
    target=dict(sigma_data=0.7123456789),
    weighting=dict(gamma=3.3, k=1.5, variance="posterior", mean=1.9, std=2.2, sigma_data=0.4,
                   schedule="linear", target="v", weighting="snr"))
REFUSED = "refused"


def spelled(name, **options):
    "A choice as a user types it."
    words = ", ".join(f"{k}={v!r}" if not isinstance(v, str) else f"{k}={v}" for k, v in options.items())
    return f"{name}({words})" if options else name


def choices(kind, registry):
    "Each entry of a registry: by its name, and with each of its options."
    for name, cls in registry.items():
        yield name
        for option in inspect.signature(cls).parameters:
            if option not in OPTIONS[kind]: continue
            value = 0.03 if (name, option) == ("ddpm", "beta_max") else OPTIONS[kind][option]
            yield spelled(name, **{option: value})


def names():
    "What every entry is called: its repr, its spelling, and the names of both kinds of runs that choose it."
    from lfdm.core import from_spec
    from lfdm.parameters import Parameters
    from lfdm.schedules import SCHEDULES
    from lfdm.steps import SAMPLERS
    from lfdm.targets import TARGETS
    from lfdm.tasks import kind_of
    from lfdm.weightings import WEIGHTINGS
    images = kind_of("images")
    of_images = dict(dataset="cifar10", content="3x32x32, 256 values, 3d019220")

    def run(kind, **given):
        "A run's name, its loss, and its choices as they are recorded."
        try: p = kind(**given)
        except (ValueError, TypeError): return REFUSED
        return dict(slug=p.slug(), loss=repr(p.loss()), target=p.target, weighting=p.weighting,
                    schedule=p.schedule, ends=[p.logsnr_min, p.logsnr_max])

    found = {}
    for kind, registry in dict(schedule=SCHEDULES, target=TARGETS, weighting=WEIGHTINGS).items():
        for choice in choices(kind, registry):
            try: made = repr(from_spec(registry, choice, kind))
            except ValueError: made = REFUSED
            given = {kind: choice} | (dict(weighting="nelbo") if "adaptive" in choice else {})
            found[f"{kind} {choice}"] = dict(repr=made, points=run(Parameters, **given),
                                             images=run(images, **of_images | given))
    for dataset in ("cluster", "ring", "swiss", "waves"):
        found[f"dataset {dataset}"] = run(Parameters, dataset=dataset)
    for sampler in SAMPLERS: found[f"sampler {sampler}"] = run(Parameters, sampler=sampler)
    of_points = dict(seed=3, width=64, epochs=7, batch_size=100, lr=3e-4, sample_steps=9, n_samples=11,
                     ema=0.99, clip=2.5, warmup=10, logsnr_max=10.1)
    for field, value in of_points.items():
        found[f"points {field}={value}"] = run(Parameters, **{field: value})
    others = dict(seed=3, network="small(width=24)", epochs=7, ema=None, clip=None, flip=True,
                  precision="bf16", judged=10, path="elsewhere", logsnr_min=-9.9)
    for field, value in others.items():
        found[f"images {field}={value}"] = run(images, **of_images | {field: value})
    found["images digits"], found["images templates"] = run(images), run(images, dataset="templates")
    return found


def points():
    "The first five points of every data set, each split, two seeds; and what identifies the sets of images."
    from lfdm.data import DATASETS
    from lfdm.tasks import kind_of
    images = kind_of("images")
    found = {f"{name} {split} {seed}": cls().sample(5, seed, split, torch.float64).tolist()
             for name, cls in DATASETS.items() for split in ("train", "test") for seed in (0, 1)}
    return found | {name: images(dataset=name).content for name in ("digits", "templates")}


def small():
    "One small run of each kind, and one stack of three, one of which moves its schedule."
    from lfdm.parameters import Parameters
    from lfdm.tasks import kind_of
    few = dict(width=8, epochs=2, batch_size=5000, sample_steps=8, n_samples=50)
    images = kind_of("images")
    optional = dict(ema=0.9, clip=1., warmup=3, sampler="ddim")
    return dict(
        one=[Parameters(target="v", weighting="sigmoid(k=3)", **optional, **few)],
        images=[images(network="small(width=4)", epochs=1, batch_size=300, sample_steps=4, n_samples=10,
                       judged=20)],
        stack=[Parameters("swiss", "eps", "nelbo", seed=1, **few),
               Parameters("cluster", "x", "weighted", seed=2, **few),
               Parameters("ring", "F", "sigmoid", "adaptive", seed=3, **few)])


def make(root):
    "Make these runs; their folders by the kind."
    from lfdm.grids import make_grid
    from lfdm.runs import folder_of, make_run
    torch.set_num_threads(1)
    wanted = small()
    for kind in ("one", "images"): make_run(wanted[kind][0], kind, root)
    make_grid(wanted["stack"], "stack", root, stack=3)
    return [folder_of(p, kind, root) for kind, parameters in wanted.items() for p in parameters]


def machine():
    "What bits depend on."
    return dict(torch=torch.__version__, python=platform.python_version(),
                capability=torch.backends.cpu.get_cpu_capability(), processor=platform.machine())


def products():
    "Letters that stand for how this processor adds up: small products as a stack of networks has them."
    g = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sums = hashlib.sha256()
    for n, k, m in ((5000, 3, 8), (5000, 8, 8), (8, 5000, 8), (5000, 8, 2), (2, 5000, 8)):
        a, b = torch.randn(3, n, k, generator=g), torch.randn(3, k, m, generator=g)
        sums.update(torch.bmm(a, b).numpy().tobytes())
    torch.set_num_threads(threads)
    return sums.hexdigest()[:16]


def bits(run):
    "Letters that stand for everything a run has: weights, samples, metrics, summary."
    weights = [w.detach().numpy().tobytes() for w in run.net.state_dict().values()]
    numbers = json.dumps([run.metrics, run.summary], sort_keys=True).encode()
    return hashlib.sha256(b"".join([*weights, run.samples.numpy().tobytes(), numbers])).hexdigest()[:16]


def add_bits():
    "Keep what the runs of points are on this processor."
    from lfdm.runs import load_run
    path = FOLDER / "bits.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as root:
        runs = {f.name: load_run(f) for f in make(root) if f.parent.name != "images"}
        known[products()] = {name: bits(run) for name, run in runs.items()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def main():
    "Write the folder."
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, content in dict(names=names(), points=points(), machine=machine()).items():
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as root:
        for folder in make(root): shutil.copytree(folder, FOLDER / "runs" / folder.parent.name / folder.name)


if __name__ == "__main__": sys.exit(add_bits() if sys.argv[1:] == ["bits"] else main())
