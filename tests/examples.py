"""A valid example of each argument of each public function, for the sweep of sweep.py."""
import itertools

import numpy as np
import PIL.Image
import sympy
import torch

from lfdm.adaptive import AdaptiveSchedule
from lfdm.checkpoints import read_checkpoint
from lfdm.contrastive import ContrastiveLoss
from lfdm.data import Cluster, Ring
from lfdm.discrete import DDPMSchedule, DiscreteSchedule
from lfdm.evaluation import mean_distance
from lfdm.images.data import Digits
from lfdm.images.features import FeatureNet
from lfdm.images.parameters import ImageParameters
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP, StackedMLP
from lfdm.parameters import Parameters
from lfdm.runs import make_run
from lfdm.schedules import CosineSchedule
from lfdm.steps import SAMPLERS, exact_denoiser
from lfdm.studies import Record
from lfdm.targets import Eps
from lfdm.tasks import task_of
from lfdm.training import TrainState
from lfdm.weighted_elbo import exact_elbos

# Not swept, each for a reason.
LEFT = {
    **dict.fromkeys(["name_in", "choice_in", "whole_number", "rowwise"], "makes a door or a method"),
    **dict.fromkeys(["write_record", "locked", "work_folder", "beside", "Run"], "a part of make_run"),
    **dict.fromkeys(["train_stacked", "sample_stacked", "side_by_side", "Runs"], "a part of make_grid"),
    **dict.fromkeys(["DownBlock", "UpBlock", "MidBlock", "ResBlock", "AttentionBlock"], "a part of UNet"),
    **dict.fromkeys(["Schedule", "BellSchedule", "FlowSchedule", "Target", "Weighting", "LogSNRWeighting",
                     "EpsFactor", "ReverseVariance",
                     "RunParameters", "Dataset", "ImageSet", "Objective", "Error", "ScaledError",
                     "Error.__call__"], "abstract"),
    **dict.fromkeys(["LossHistory.set", "LossHistory.slope", "LossHistory.load_state",
                     "Uncertainty.lowest", "Uncertainty.require_range", "LossHistory.at", "LossHistory.rows",
                     "AdaptiveSchedule.together", "AdaptiveSchedule.apart", "TrainState.descend",
                     *(f"{kind}Task.{does}" for kind in ("Image", "Points")
                       for does in ("fit", "judge", "samples"))], "called by its owner"),
    **dict.fromkeys([f"{error}.{does}"
                     for error in ("Squared", "L1", "Huber", "PseudoHuber", "LogCosh", "Error")
                     for does in ("rho", "slope", "scale")], "a formula, called by its owner"),
    **dict.fromkeys([f"{kind}Variance.log_ratio" for kind in
                     ("Posterior", "Step", "Interpolated", "Optimal", "Reverse")], "called by a step"),
    **dict.fromkeys([f"Stored.{does}" for does in ("floats", "centred", "blocks", "dots", "some")],
                    "called by its owner"),
    **dict.fromkeys(["Bracket", "Values", "Errors"], "made by bracket"),
    **dict.fromkeys(["Row", "Row.with_numbers", "Row.curve", "Row.loss"], "from a file, checked there"),
    **dict.fromkeys(["explorer_data", "explorer_page", "write_explorer"], "seconds each: test_explorer.py"),
    **dict.fromkeys(["inception", "inception_file", "fid", "CIFAR10", "advice"], "needs files not here")}

# What looks wrong and is right here: (function, argument, kind).
RIGHT = {
    ("Record", "settings", "a dict"), ("mean_sd", "form", "no word"), ("ScoreMatchingLoss", "levels", "3"),
    ("table", "head", "a list of nothing"), ("table", "head", "a list of words"),
    ("content_digest", "metadata", "a dict"), ("which_loss", "version", "no word"),
    ("parameters_from", "namespace", "a dict"),                  # the message names the parameter in it
    ("UNet", "multipliers", "3"), ("UNet", "attention", "3"),    # one level; at one resolution
    # a run's name, and what the user states of a number
    *itertools.product(["TrainState.save", "TrainState.load", "write_checkpoint"], ["run"],
                       ["a word", "no word"]),
    *itertools.product(["stated"], ["sampler"], ["a word", "no word", "3"]),
    *itertools.product(["stated"], ["sampler", "steps", "ema", "seed"], ["None"])}

# Defaults that would take long: the example instead.
LONG = {"steps", "points", "draws", "projections", "n", "repeats", "epochs", "batch_size", "real", "T", "k",
        "max_steps", "chunk", "rtol", "atol", "width"}

NUMBERS = dict(
    nu=0.5, log_ratio=0.5,
    n=3, k=4, m=5, seed=0, steps=2, points=21, bins=4, repeats=2, draws=2, chunk=2, batch_size=2, dim=2,
    dims=4, width=8, depth=2, epochs=1, warmup=2, cooldown=2, left=1, max_steps=500, arrows=3, real=50,
    columns=2, gap=1,
    moment=1, T=20, levels=17, n_train=4, n_test=4, workers=1, stack=2, inputs=8, outputs=8, out=8,
    channels=1, classes=10, heads=1, layers=1, time=8, threads=1, projections=4, mid=1, halvings=1,
    features=4, alpha=0.8, sigma=0.6, low=-5.0, high=5.0, size=0.1, std=0.5, decay=0.9, uniform=0.1,
    fine=2.0, ema=0.9, clip=1.0, lr=1e-3, rtol=1e-3, atol=1e-3, nats=1.0, limit=2.0, quantile=0.1,
    prior=1.0, start=1.0, end=0.5, angle=0.5, logsnr_min=-9.0, logsnr_max=9.0, mean=1.0, dropout=0.0,
    sure=0.5, thickness=0.1, turns=1.5)

WORDS = dict(
    schedule="cosine", target="eps", weighting="weighted", source="x", scale="smoke", study="sweep",
    name="cluster", sampler="ddim", device="cpu", split="test", form=".3f", trace="exact", kind="sign",
    objective="denoising", w="sigmoid", decoder="gaussian", variance="beta", attention="mid",
    beta="linear", what="records", of="digits", precision="float32", network="small", note="",
    command="make", symbol="α", multipliers="1, 2")


def randn(*shape): return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
def silent(*report): pass
def fall(z): return -z
def fall_in_time(start, z): return -z
def unchanged(z, level): return z, z
def nothing(**settings): return dict(a=np.zeros(1))
def new_net(): return MLP(2, 8, 2)
def new_stack(): return StackedMLP([new_net(), new_net()])


class New:
    "An example that is made anew for each call: New(function)."
    def __init__(self, make): self.make = make


def write_pictures(folder):
    "A folder of images with two splits."
    for split in ("train", "test"):
        (folder / split / "a").mkdir(parents=True)
        for i in range(4): PIL.Image.new("L", (4, 4), i).save(folder / split / "a" / f"{i}.png")
    return folder


def examples(folder):
    "(argument -> example, function -> its own examples); what they need is made in the folder."
    cluster, cosine, digits = Cluster(), CosineSchedule(), Digits()
    times, digit = torch.tensor([.2, .5, .8]), digits.test()[:4]
    s, t = (cosine.level(torch.tensor(u)) for u in (.4, .5))
    loss = DiffusionLoss("cosine", "eps", "weighted")

    few = dict(epochs=1, n_samples=8, sample_steps=2)
    points = dict(dataset="cluster", batch_size=5000, width=4, **few)
    p = Parameters(**points)
    images = ImageParameters("digits", network="small(width=4)", batch_size=500, judged=4, **few)
    run, images_run = (make_run(one, "sweep", folder) for one in (p, images))

    pictures, checkpoint = write_pictures(folder / "pictures"), folder / "checkpoint"
    TrainState(new_net()).save(checkpoint)
    Record(dict(a=1), [dict(a=1)], dict(a=np.zeros(1))).save("sweep", "smoke")

    tensors = dict(
        logsnr=torch.tensor([-1., 0., 1.]), t=times, u=times, z=randn(3, 2), x=randn(3, 2), y=randn(3, 2) + 1,
        y_hat=randn(3, 2), eps=randn(3, 2) - 1, noise=randn(3, 2), samples=randn(30, 2), slope=torch.ones(21),
        value=torch.tensor([1., 2., 3.]), images=digit, means=torch.tensor([[0., 0.], [1., 1.]]),
        labels=torch.arange(40) % 4, betas=torch.tensor([.1, .2, .3]), times=torch.tensor([.2, .5]))
    others = dict(
        level=cosine.level(times), s=s, loss=loss, net=New(new_net), denoiser=exact_denoiser(cluster),
        dataset=cluster, exact=cluster, q=cluster, p=Ring(k=8), score=fall, f=fall, denoise=cluster.denoise,
        progress=silent, generator=New(torch.Generator), distance=mean_distance, make=nothing,
        run=run, folder=run.folder, root=folder, path=folder / "new", parameters=p, task=task_of(p),
        kind=Parameters, namespace=vars(p), state=New(lambda: TrainState(new_net())),
        losses=[loss, loss], data=[randn(6, 2), randn(6, 2)], nets=New(lambda: [new_net(), new_net()]),
        generators=New(lambda: [torch.Generator(), torch.Generator()]), targets=["eps", "x"], seeds=[0, 1],
        shape=(3, 2), dtype=torch.float32, within=(-5., 5.), e=exact_elbos(cluster, points=21),
        arrays=dict(a=np.zeros(1)), settings=dict(a=1), rows=[dict(a=1)], head=["a"], values=[1., 2.],
        ways=["euler, 8"], spread=cluster.mmse,
        scheduler=New(diffusers_scheduler), download=False, compiled=False, flip=False,
        low_discrepancy=True, others=(),
        **dict.fromkeys(["weights", "validation", "validations", "prepare", "forward", "accelerator"]))

    chain, bytes_8 = DDPMSchedule(), torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8)
    a_step, on_stack = dict(s=s, t=t), dict(net=New(new_stack))
    on_digits = dict(dataset=digits, samples=digits.train()[:80], images=digit, denoiser=unchanged)
    measured = dict(steps=[1], epochs=[1], times=[.5], points=4, arrows=2, logsnr=[0.])
    own = dict(
        # levels, losses, data
        transition=a_step, posterior=a_step, sde=dict(schedule=cosine), dlog_alpha=dict(schedule=cosine),
        Staircase=dict(levels=torch.tensor([3., 0., -3.])), DDPMSchedule=dict(T=1000, logsnr_min=None),
        eps_slope=dict(logsnr=.5), exact_slope=dict(logsnr=.5), elbos=dict(logsnr=torch.linspace(-5, 5, 21)),
        midpoints=dict(k=8), random_frame=dict(dim=6, columns=2), as_dataset=dict(dataset="swiss"),
        Embedded=dict(of="swiss", dim=2),
        projected_divergence=dict(u=randn(3, 2)), Explicit=dict(exact=cluster.score),
        ScoreMatchingLoss=dict(levels=[-3., 3.]), P2=dict(k=1.), Sigmoid=dict(k=2.), floor=dict(points=201),
        Monotonic=dict(weighting="sech"),
        # steps, sampling, likelihood
        snr_gain=a_step, chain_floor=dict(schedule=DiscreteSchedule(T=8)),
        **{f"{name}_step": a_step for name in SAMPLERS}, velocity=dict(level=t), prior_kl=dict(level=s),
        at_angle=dict(angle=torch.tensor(.5)), solve=dict(f=fall_in_time, state=randn(3, 2)),
        stack_denoiser=on_stack, sample_stack=on_stack, image_bound=on_digits, flow_bits_per_dim=on_digits,
        discrete_reconstruction=dict(images=digit, level=s), flow_log_prob=dict(denoiser=unchanged),
        # training
        train=dict(x=randn(6, 2)), ValidationSet=dict(x=randn(40, 2)),
        TrainState=dict(ema=None, clip=None, losses=()),
        train_stack=dict(state=New(lambda: TrainState(new_stack(), seed=[0, 1]))),
        content_digest=dict(tensors=dict(a=torch.ones(2)), metadata=dict(a="b")),
        write_checkpoint=dict(run="a run"), read_checkpoint=dict(path=checkpoint),
        restore=dict(record=New(lambda: read_checkpoint(checkpoint))),
        # runs, grids, studies
        Parameters=dict(dataset="ring"), kind_of=dict(name="points"), schedule_named=dict(name="cosine"),
        stacks_of=dict(parameters=[p]), make_grid=dict(parameters=[p]),
        make_images=dict(parameters=[images]),
        measure=measured, measured=dict(settings=measured), all_cached=dict(settings=[dict(a=1)]),
        remembered=dict(parts=(1,)),
        condense=dict(parameters=[p], settings=measured), make_record=dict(parameters=[p], settings=measured),
        load_record=dict(name="sweep", scale="smoke"), network_quality=dict(parameters=points),
        learned_score=dict(logsnr=.5), sample_quality=dict(levels=("cosine", -9., 9.)),
        paired_ratio=dict(a=[1., 2.], b=[2., 3.], level=.9), holm=dict(p_values=[.1, .2]),
        error_floor=dict(n=10), contrastive_floor=dict(loss=ContrastiveLoss()),
        Stored=dict(convert=None), overlap=dict(held_out=randn(5, 2)),
        Empirical=dict(x=randn(30, 2), convert=None, draws=4),
        bracket=dict(x=randn(40, 2), held_out=randn(8, 2), labels=None, held_out_labels=None, transform=None,
                     logsnr=torch.tensor([-3., 0., 3.]), draws=4, components=2, copies=1, reduction="mean"),
        own_w=dict(own=dict(a='1 - u', b='u', y='e - x', weight='1')), which_loss=dict(code='diffusers'),
        symbolic=dict(cls=CosineSchedule), schedule_formulas=dict(cls=CosineSchedule),
        as_javascript=dict(expression=sympy.Symbol('x')),
        verdict=dict(low=.9, high=1.2, p=.5, margin=1.1), next_rates=dict(means={1e-3: 1.}),
        outcomes=dict(parameters=[p]),
        # images
        dequantize=dict(u=torch.rand(digit.shape)), class_files=dict(folder=pictures / "train"),
        decode=dict(files=sorted((pictures / "test" / "a").iterdir()), size=None),
        ImageFolder=dict(path=pictures, size=None), image_set=dict(name="digits", path=None),
        content_of=dict(images=digits), mirrored=dict(x=randn(3, 1, 4, 4)),
        log_cell=dict(low=randn(3), high=randn(3) + 9), cell_integrals=dict(levels=16),
        classifier_features=dict(net=New(lambda: FeatureNet(1, 10, 4, 8))),
        feature_net=dict(dataset=digits, steps=1),
        feature_distance=on_digits | dict(net=None, n=20), classifier_view=on_digits | dict(net=None),
        judge_images=on_digits | dict(images=digits), moments=dict(features=randn(9, 3)),
        frechet_distance=dict(mean_x=randn(2), mean_y=randn(2), cov_x=torch.eye(2), cov_y=torch.eye(2)),
        stated=dict(report=dict(measure="FID", value=1., n=3, reference="x", reference_n=3, weights="w",
                                levels=17, dims=64)),
        ImageParameters=dict(dataset="digits", path=None, ema=None, clip=None),
        image_table=dict(run=images_run), ImageTask=dict(parameters=images),
        unet=dict(name="small", size=16), time_embedding=dict(dim=4), TimeEmbedding=dict(dim=4),
        # other code bases
        as_network=dict(unet=unchanged, schedule="ddpm"), as_unet=dict(schedule="ddpm"),
        from_diffusers=dict(logsnr_max=12.9),
        to_diffusers=dict(schedule="ddpm", kind="DDPMScheduler", T=None))
    own |= {
        # methods: of one class, or of all
        "Squared.__call__": dict(residual=randn(3, 2), logsnr=torch.zeros(3)),
        **dict.fromkeys(["AdaptiveSchedule.load_state", "Uncertainty.load_state"],
                        dict(state=AdaptiveSchedule(-9., 9.).state())),
        "PointsTask.restored": dict(array=np.zeros((3, 2))),
        "ImageTask.restored": dict(array=np.zeros((3, 1, 16, 16), np.uint8)),
        "ImageTask.stored": dict(samples=bytes_8), "Record.values": dict(name="a"),
        "TrainState.load": dict(path=checkpoint, run=None), "TrainState.save": dict(run="a run"),
        ".ending_at": dict(logsnr=-40.),
        ".factor": dict(schedule=cosine, target=Eps()), ".eps_factor": dict(schedule=cosine, target=Eps()),
        "DDPMVLB.eps_factor": dict(schedule=chain, target=Eps()), ".bits_per_dim": dict(images=bytes_8),
        "Templates.log_prob": dict(images=bytes_8), "Templates.denoise": dict(z=randn(3, 1, 8, 8)),
        "Templates.log_prob_at": dict(z=randn(3, 1, 8, 8))}
    return NUMBERS | tensors | WORDS | others, own


def diffusers_scheduler():
    from diffusers import DDPMScheduler
    return DDPMScheduler()
