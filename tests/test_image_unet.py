"Attempts to break lfdm.images.unet: random options and sizes, precisions, and wrong input."
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.core import seeded
from lfdm.discrete import DDPMSchedule
from lfdm.images.unet import (
    UNETS,
    AttentionBlock,
    ResBlock,
    UNet,
    require_size,
    time_embedding,
    unet,
)
from lfdm.interop import as_unet
from lfdm.schedules import network_time

torch.set_num_threads(1)
f64 = torch.float64
close = lambda a, b, within=1e-12: torch.testing.assert_close(a, b, rtol=0, atol=within)


def awake(net):
    "The network with random numbers where a new one has zeros."
    g = seeded(0)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any(): p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return net


def tiny(**options):
    return awake(UNet(**dict(channels=2, width=4, multipliers=(1, 2), layers=1, mid=1) | options))


def batch(n=3, channels=2, height=8, width=8):
    g = seeded(0)
    return torch.randn(n, channels, height, width, generator=g), torch.rand(n, generator=g)


# --- any options, any size

@st.composite
def options(draw):
    multipliers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    blocks, whole = len(multipliers), lambda low, high: draw(st.integers(low, high))
    some = st.lists(st.integers(0, blocks - 1), max_size=2)
    return dict(channels=whole(1, 3), width=draw(st.sampled_from([2, 4, 6, 10])), multipliers=multipliers,
                layers=whole(1, 2), halvings=draw(st.none() | st.integers(0, blocks)),
                attention=draw(st.sampled_from(['all', 'mid', 'none']) | some), mid=whole(0, 2),
                heads=whole(1, 2), dropout=draw(st.sampled_from([0., 0.1])))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(options(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_output_is_like_the_input_and_gradients_reach_every_parameter(options, n, rows, columns):
    net = awake(UNet(**options))
    step = 2 * 2**net.options['halvings']
    z, u = batch(n, options['channels'], step * rows, step * columns)
    out = net(z, u)
    assert out.shape == z.shape and out.dtype == z.dtype and out.isfinite().all()
    (out - torch.randn_like(out)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    with torch.device('meta'): again = UNet(**json.loads(json.dumps(net.options)))
    shapes = lambda net: {k: v.shape for k, v in net.state_dict().items()}
    assert shapes(net) == shapes(again) and json.dumps(again.options) == json.dumps(net.options)


# --- what a prediction depends on

@pytest.mark.parametrize('width', [2, 3])
def test_time_matters_at_every_width(width):
    "with one channel to a group, the second group norm of a resnet block takes the time away again"
    block = awake(ResBlock(width, width, 16)).double()
    x, time = torch.randn(2, width, 4, 4, dtype=f64), torch.randn(2, 16, dtype=f64)
    assert (block(x, time) - block(x, time.flip(0))).abs().max() > 1e-3
    net, (z, u) = tiny(width=width), batch()
    assert (net(z, u) - net(z, u.flip(0))).abs().max() > 1e-5


@pytest.mark.parametrize('attention, where', [
    ('all', 'down.0 down.1 mid.0 up.0 up.1'), ('none', ''), ((), 'mid.0'), ('1', 'down.1 mid.0 up.0')])
def test_attention_is_where_it_was_asked_for(attention, where):
    found = [name for name, m in tiny(attention=attention).named_modules() if isinstance(m, AttentionBlock)]
    assert ['.'.join(name.split('.')[:2]) for name in found] == where.split()


def test_two_heads_are_the_formula():
    block = awake(AttentionBlock(8, 2)).double()
    x = torch.randn(2, 8, 3, 5, dtype=f64, generator=seeded(0))
    qkv = block.qkv(block.norm(x).flatten(2).mT).chunk(3, -1)
    q, k, v = (a.unflatten(2, (2, -1)).transpose(1, 2) for a in qkv)
    seen = (torch.softmax(q @ k.mT / 4**0.5, -1) @ v).transpose(1, 2).flatten(2)
    close(block(x), x + block.out(seen).mT.unflatten(2, (3, 5)))


def test_embedding_is_exact():
    u = torch.rand(200, dtype=f64, generator=seeded(0))
    angles = 1000 * u[:, None] * 10000**(-torch.arange(8, dtype=f64) / 8)
    close(time_embedding(u, 16), torch.cat([angles.sin(), angles.cos()], 1), 1e-9)
    close(time_embedding(u.float(), 16).double(), time_embedding(u, 16), 3e-4)


# --- precision, dropout, the compiler

def test_autocast_returns_the_dtype_of_z_and_is_close():
    net, (z, u) = tiny(width=8, attention='all'), batch()
    exact = net(z, u)
    with torch.autocast('cpu', torch.bfloat16): out = net(z, u)
    assert out.dtype == torch.float32 and 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()
    out.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_sixteen_bits_keep_times_apart():
    "u is shown in float32 to a network of 16 bits; of a thousand times 501 are distinct in bfloat16"
    dtype, told = torch.bfloat16, []
    net = tiny().to(dtype)
    net.time.register_forward_hook(lambda module, inputs, out: told.append(out))
    chain = as_unet(net, 'ddpm', (2, 8, 8))
    z, k = torch.zeros(1000, 2, 2, 2, dtype=dtype), torch.arange(1000)
    with torch.no_grad(): out = chain(z, k).sample
    u = network_time(DDPMSchedule().logsnr((k + 1).double() / 1000)).float()
    exact = time_embedding(u, net.time.dim).to(dtype)
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.equal(told[0], net.time.layers(exact)) and len(exact.unique(dim=0)) > 950


def test_dropout_acts_in_training_only():
    net, data = tiny(dropout=0.5), batch()
    assert not torch.equal(net(*data), net(*data))
    assert torch.equal(net.eval()(*data), net(*data))


def test_the_graph_is_whole_for_the_compiler():
    "one graph, no breaks; run by a backend that needs no C compiler"
    net, (z, u) = tiny(multipliers=(1,), halvings=1, attention='all', mid=0), batch()
    torch.testing.assert_close(torch.compile(net, backend='eager', fullgraph=True)(z, u), net(z, u))
    with pytest.raises(ValueError, match='cannot be halved'): net(z[..., :7], u)


# --- wrong input

@pytest.mark.parametrize('name, bad, message', [
    ('multipliers', '', 'at least one'), ('multipliers', (1, 0), 'multipliers'), ('layers', 0, 'layers'),
    ('multipliers', [1] * 99, 'at most 20'), ('attention', (-1,), 'attention'), ('layers', 10**9, 'layers')])
def test_bad_options(name, bad, message):
    with pytest.raises(ValueError, match=message): tiny(**{name: bad})


def test_data_that_do_not_fit():
    net = tiny()
    for shape in ((3, 1, 8, 8), (2, 8, 8)):
        with pytest.raises(ValueError, match='images of shape .n, 2, H, W., not'):
            net(torch.zeros(shape), torch.zeros(shape[0]))
    for wrong in ((), (1,), (3, 1)):
        with pytest.raises(ValueError, match='u must have shape .2,.'):
            net(torch.zeros(2, 2, 8, 8), torch.zeros(wrong))
    for u, dim, said in ((torch.zeros(3, 1), 4, 'u must'), (torch.zeros(3), 3, 'dim must be even')):
        with pytest.raises(ValueError, match=said): time_embedding(u, dim)


@given(st.integers(0, 5), st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_sizes_are_taken_exactly_when_they_can_be_halved(halvings, height, width):
    of = lambda halvings: dict(halvings=halvings)
    if height % 2**halvings == width % 2**halvings == 0: return require_size(of(halvings), height, width)
    with pytest.raises(ValueError, match=f'{height}×{width} .* halved {halvings} times') as error:
        require_size(of(halvings), height, width)
    text = str(error.value)
    for near in text.split('nearest sizes: ')[1].split('. Or')[0].split(' and '):
        h, w = map(int, near.split('×'))
        require_size(of(halvings), h, w)
        assert abs(h - height) < 2**halvings and abs(w - width) < 2**halvings
    most = int(text.split('halvings=')[1].split()[0].rstrip('.'))
    require_size(of(most), height, width)
    with pytest.raises(ValueError): require_size(of(most + 1), height, width)


# --- by name

def test_the_presets_stay_what_runs_know_them_by():
    "A run's name holds the preset's: changed options need a name of their own, or a RESULTS_VERSION."
    with torch.device('meta'): nets = {name: unet(name) for name in UNETS}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert counts == dict(small=140819, thesis=69063299, ddpm=36867331)


def test_words_with_options():
    net = unet("small(width=4, multipliers='1, 2', halvings=1, attention='0')", 1, (6, 10))
    given = dict(width=4, multipliers=(1, 2), attention=(0,), channels=1)
    assert net.options | given == net.options and net(*batch(1, 1, 6, 10)).shape == (1, 1, 6, 10)


@pytest.mark.parametrize('words, size, message', [
    ('small(3)', 16, 'width'), ('small(channels=3)', 16, "unknown option of small: 'channels'"),
    ('small', 10, 'nearest sizes: 8×8 and 12×12'), ('small', (16, 16, 1), 'size must be')])
def test_wrong_words_and_sizes(words, size, message):
    with pytest.raises((TypeError, ValueError), match=message): unet(words, 1, size)
