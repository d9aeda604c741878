"Attempts to break lfdm.images.unet: random options and sizes, precisions, memory formats, and wrong input."
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.images.unet import (
    UNETS,
    AttentionBlock,
    ResBlock,
    TimeEmbedding,
    UNet,
    require_size,
    time_embedding,
    unet,
)
from lfdm.losses import DiffusionLoss

torch.set_num_threads(1)
f64, last = torch.float64, torch.channels_last
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
close = lambda a, b, within=1e-12: torch.testing.assert_close(a, b, rtol=0, atol=within)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def awake(net):
    "The network with random numbers where a new one has zeros."
    g = generator()
    with torch.no_grad():
        for p in net.parameters():
            if not p.any(): p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return net


def tiny(**options):
    return awake(UNet(**dict(channels=2, width=4, multipliers=(1, 2), layers=1, mid=1) | options))


def batch(n=3, channels=2, height=8, width=8):
    g = generator()
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


@few
@given(options(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_output_is_like_the_input_and_gradients_reach_every_parameter(options, n, rows, columns):
    net = awake(UNet(**options))
    step = 2 * 2**net.options['halvings']
    z, u = batch(n, options['channels'], step * rows, step * columns)
    out = net(z, u)
    assert out.shape == z.shape and out.dtype == z.dtype and out.isfinite().all()
    (out - torch.randn_like(out)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@few
@given(options())
def test_options_make_the_same_network_again(options):
    with torch.device('meta'):
        net = UNet(**options)
        again = UNet(**json.loads(json.dumps(net.options)))
    shapes = lambda net: {k: v.shape for k, v in net.state_dict().items()}
    assert shapes(net) == shapes(again) and json.dumps(again.options) == json.dumps(net.options)


def test_a_new_network_predicts_zero_and_learns():
    torch.manual_seed(0)
    net, loss = UNet(1, 8, (1, 2), layers=1, mid=1), DiffusionLoss('cosine', 'v', 'weighted')
    x = torch.tensor([-1., 1.]).repeat(16).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)     # black and white
    assert not net(*batch(channels=1)).any()
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        losses.append(loss(net, x).mean())
        optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0]


# --- what a prediction depends on

@torch.no_grad()
def test_each_example_is_predicted_by_itself():
    net, (z, u) = tiny(attention='all').double().eval(), (a.double() for a in batch(5))
    out, order = net(z, u), torch.tensor([3, 0, 4, 1, 2])
    close(net(z[order], u[order]), out[order])
    for i in range(5): close(net(z[i:i + 1], u[i:i + 1]), out[i:i + 1])
    z[1] = math.nan
    assert net(z, u).isfinite().flatten(1).all(1).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize('width', [2, 3, 4, 8, 16])
def test_time_matters_at_every_width(width):
    "with one channel to a group, the second group norm of a resnet block takes the time away again"
    block = awake(ResBlock(width, width, 16)).double()
    x, time = torch.randn(2, width, 4, 4, dtype=f64), torch.randn(2, 16, dtype=f64)
    assert (block(x, time) - block(x, time.flip(0))).abs().max() > 1e-3
    net, (z, u) = tiny(width=width), batch()
    assert (net(z, u) - net(z, u.flip(0))).abs().max() > 1e-5


@pytest.mark.parametrize('attention, where', [
    ('all', 'down.0 down.1 mid.0 up.0 up.1'), ('mid', 'mid.0'), ('none', ''), ((), 'mid.0'),
    ('1', 'down.1 mid.0 up.0'), ((0,), 'down.0 mid.0 up.1')])
def test_attention_is_where_it_was_asked_for(attention, where):
    found = [name for name, m in tiny(attention=attention).named_modules() if isinstance(m, AttentionBlock)]
    assert ['.'.join(name.split('.')[:2]) for name in found] == where.split()


@pytest.mark.parametrize('heads', [2, 4])
def test_attention_block_is_the_formula(heads):
    block = awake(AttentionBlock(8, heads)).double()
    x = torch.randn(2, 8, 3, 5, dtype=f64, generator=generator())
    qkv = block.qkv(block.norm(x).flatten(2).mT).chunk(3, -1)
    q, k, v = (a.unflatten(2, (heads, -1)).transpose(1, 2) for a in qkv)
    seen = (torch.softmax(q @ k.mT / (8 / heads)**0.5, -1) @ v).transpose(1, 2).flatten(2)
    close(block(x), x + block.out(seen).mT.unflatten(2, (3, 5)))


# --- the time embedding

def test_embedding_is_exact_to_float32_and_bounded():
    u = torch.rand(200, dtype=f64, generator=generator())
    angles = 1000 * u[:, None] * 10000**(-torch.arange(8, dtype=f64) / 8)
    close(time_embedding(u, 16), torch.cat([angles.sin(), angles.cos()], 1), 1e-9)
    close(time_embedding(u.float(), 16).double(), time_embedding(u, 16), 3e-4)
    assert time_embedding(u.bfloat16(), 32).dtype == torch.float32


def test_embedded_times_stay_distinct_under_autocast():
    with torch.autocast('cpu', torch.bfloat16): out = TimeEmbedding(32, 64)(torch.arange(1000) / 1000)
    assert len(out.unique(dim=0)) == 1000


# --- precision, memory format, copies

def test_memory_formats_agree_in_value_and_gradient():
    net, (z, u) = tiny(attention='all').double(), (a.double() for a in batch())
    twin = copy.deepcopy(net).to(memory_format=last)
    out, other = net(z, u), twin(z.contiguous(memory_format=last), u)
    assert other.is_contiguous(memory_format=last)
    close(out, other)
    out.square().sum().backward(), other.square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_autocast_returns_the_dtype_of_z_and_is_close():
    net, (z, u) = tiny(width=8, attention='all'), batch()
    exact = net(z, u)
    with torch.autocast('cpu', torch.bfloat16): out = net(z, u)
    assert out.dtype == torch.float32 and 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()
    out.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert copy.deepcopy(net).bfloat16()(z.bfloat16(), u.bfloat16()).dtype == torch.bfloat16


def test_a_deep_copy_stands_alone():
    net, data = tiny(), batch()
    twin, out = copy.deepcopy(net), net(*data)
    assert torch.equal(twin(*data), out) and twin.options == net.options
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    assert torch.equal(net(*data), out) and not twin(*data).any()


def test_dropout_acts_in_training_only():
    net, data = tiny(dropout=0.5), batch()
    assert not torch.equal(net(*data), net(*data))
    net.eval()
    assert torch.equal(net(*data), net(*data))


def test_the_graph_is_whole_for_the_compiler():
    "one graph, no breaks; run by a backend that needs no C compiler"
    net, (z, u) = tiny(attention='all'), batch()
    torch.testing.assert_close(torch.compile(net, backend='eager', fullgraph=True)(z, u), net(z, u))
    with pytest.raises(ValueError, match='cannot be halved'): net(z[..., :7], u)


def test_names_of_the_parameters_stay():
    "checkpoints are read by these names"
    names = list(tiny(attention='all').state_dict())
    parts = dict.fromkeys(name.rpartition('.')[0] for name in names)
    assert list(parts)[:5] == ['time.layers.0', 'time.layers.2', 'first', 'down.0.layers.0.first.0',
                               'down.0.layers.0.first.2'] and len(names) == 110
    assert set(parts) >= {
        'down.0.halve', 'down.1.layers.0.residual', 'down.0.layers.0.time.1', 'down.0.layers.0.second.3',
        'down.0.layers.1.norm', 'down.0.layers.1.qkv', 'down.0.layers.1.out', 'mid.0.layers.2.first.2',
        'up.1.doubled.1', 'up.0.layers.0.residual', 'last.0', 'last.2'}


# --- wrong input

@pytest.mark.parametrize('name, bad, message', [
    ('width', 0, 'at least 2'), ('width', 2.5, 'whole number'), ('channels', 0, 'channels'),
    ('layers', 0, 'layers'), ('mid', -1, 'mid'), ('multipliers', (), 'at least one'),
    ('multipliers', '', 'at least one'),
    ('multipliers', '1, two', "'1, two'"), ('multipliers', (1, 0), 'multipliers'),
    ('attention', 'al', "Did you mean 'all'"), ('attention', '9', 'numbered from 0 to 1'),
    ('attention', (0, 2), 'numbered from 0 to 1'), ('attention', (-1,), 'attention'),
    ('heads', 3, '3 heads do not divide 8 channels'), ('halvings', 3, 'from 0 to 2'),
    ('dropout', 1.5, 'dropout')])
def test_bad_options(name, bad, message):
    with pytest.raises(ValueError, match=message): tiny(**{name: bad})


@pytest.mark.parametrize('bad', [dict(width='wide'), dict(multipliers=None), dict(multipliers=(1, 'a')),
                                 dict(heads=True), dict(attention=1j)])
def test_bad_types(bad):
    with pytest.raises(TypeError): tiny(**bad)


@pytest.mark.parametrize('shape', [(3, 2), (3, 1, 8, 8), (2, 8, 8)])
def test_data_that_are_no_such_images(shape):
    with pytest.raises(ValueError, match=rf'images of shape \(n, 2, H, W\), not \({shape[0]}'):
        tiny()(torch.zeros(shape), torch.zeros(shape[0]))


@given(st.integers(0, 5), st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
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

@pytest.mark.parametrize('name, low, high', [
    ('small', 1e5, 2.5e5), ('ddpm', 30e6, 40e6), ('thesis', 20e6, 100e6)])
def test_presets(name, low, high):
    with torch.device('meta'):
        net = unet(name, 3, 32)
        assert net(torch.empty(2, 3, 32, 32), torch.empty(2)).shape == (2, 3, 32, 32)
    assert low < sum(p.numel() for p in net.parameters()) < high
    if name != 'thesis': return
    kinds = lambda blocks: [[type(m) for m in block.layers] for block in blocks]
    assert kinds([*net.down, *net.up]) == [[ResBlock, AttentionBlock] * 6] * 8
    assert kinds(net.mid) == [[ResBlock] + [AttentionBlock, ResBlock] * 6] * 3


def test_words_with_options():
    net = unet("small(width=4, multipliers='1, 2', halvings=1, attention='0')", 1, (6, 10))
    given = dict(width=4, multipliers=(1, 2), attention=(0,), channels=1)
    assert net.options | given == net.options and net(*batch(1, 1, 6, 10)).shape == (1, 1, 6, 10)


@pytest.mark.parametrize('words, size, message', [
    ('smal', 16, "Did you mean 'small'"), ('small(wdth=3)', 16, "Did you mean 'width'"),
    ('small(3)', 16, 'width'),
    ('small(channels=3)', 16, "unknown option of small: 'channels'"), ('small(width=0)', 16, 'width must be'),
    ('small', 10, 'nearest sizes: 8×8 and 12×12'), ('thesis', (32, 24), 'halvings=3 or less')])
def test_wrong_words_and_sizes(words, size, message):
    with pytest.raises(ValueError, match=message): unet(words, 1, size)


def test_the_presets_stay_what_runs_know_them_by():
    "A run's name holds the preset's: changed options need a name of their own, or a RESULTS_VERSION."
    keys = ('width', 'multipliers', 'layers', 'halvings', 'attention', 'mid', 'heads')
    of = lambda *values: dict(zip(keys, values))
    presets = dict(small=of(16, '1, 1, 2', 1, 2, 'mid', 1), ddpm=of(128, '1, 2, 2, 2', 2, 3, '1', 3),
                   thesis=of(64, '1, 2, 3, 4', 6, 4, 'all', 3, 4))
    assert presets == UNETS
