"Attempts to break lfdm.images.unet: random options and sizes, precisions, memory formats, and wrong input."
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.losses import DiffusionLoss
from lfdm.images.unet import UNETS, AttentionBlock, ResBlock, TimeEmbedding, UNet, require_size, time_embedding, unet

torch.set_num_threads(1)
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def awake(net, seed=0):
    "The network with random numbers where a new one has zeros."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any(): p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return net


def tiny(**options): return awake(UNet(**dict(channels=2, width=4, multipliers=(1, 2), layers=1, mid=1) | options))


def batch(n=3, channels=2, height=8, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width, generator=g), torch.rand(n, generator=g)


def parameters(net): return sum(p.numel() for p in net.parameters())


# --- any options, any size

@st.composite
def options(draw):
    multipliers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    blocks = len(multipliers)
    attention = draw(st.sampled_from(['all', 'mid', 'none']) | st.lists(st.integers(0, blocks - 1), max_size=2))
    return dict(channels=draw(st.integers(1, 3)), width=draw(st.sampled_from([2, 4, 6, 10])), multipliers=multipliers, layers=draw(st.integers(1, 2)),
                halvings=draw(st.none() | st.integers(0, blocks)), attention=attention, mid=draw(st.integers(0, 2)), heads=draw(st.integers(1, 2)), dropout=draw(st.sampled_from([0., 0.1])))


@few
@given(options(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_output_is_like_the_input_and_gradients_reach_every_parameter(options, n, rows, columns):
    net = awake(UNet(**options))
    step = 2**net.options['halvings']
    z, u = batch(n, options['channels'], 2 * step * rows, 2 * step * columns)
    out = net(z, u)
    assert out.shape == z.shape and out.dtype == z.dtype and out.isfinite().all()
    (out - torch.randn_like(out)).square().sum().backward()
    unmoved = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not unmoved


@few
@given(options())
def test_options_make_the_same_network_again(options):
    with torch.device('meta'): net = UNet(**options); again = UNet(**json.loads(json.dumps(net.options)))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert json.dumps(again.options) == json.dumps(net.options)


def test_a_new_network_predicts_zero_and_learns():
    torch.manual_seed(0)
    net, loss = UNet(1, 8, (1, 2), layers=1, mid=1), DiffusionLoss('cosine', 'v', 'weighted')
    x = torch.ones(32, 1, 8, 8) * torch.tensor([-1., 1.]).repeat(16)[:, None, None, None]     # two images, black and white
    z, u = batch(channels=1)
    assert not net(z, u).any()
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        losses.append(loss(net, x).mean())
        optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0]


# --- what a prediction depends on

def test_each_example_is_predicted_by_itself():
    net, (z, u) = tiny(attention='all').double().eval(), batch(5)
    z, u, order = z.double(), u.double(), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        out = net(z, u)
        torch.testing.assert_close(net(z[order], u[order]), out[order], rtol=0, atol=1e-12)
        for i in range(5): torch.testing.assert_close(net(z[i:i + 1], u[i:i + 1]), out[i:i + 1], rtol=0, atol=1e-12)
        z[1] = math.nan
        assert net(z, u).isfinite().flatten(1).all(1).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize('width', [2, 3, 4, 8, 16])
def test_time_matters_at_every_width(width):
    "with one channel to a group, the second group norm of a resnet block takes the time away again"
    block = awake(ResBlock(width, width, 16)).double()
    x, time = torch.randn(2, width, 4, 4, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    assert (block(x, time) - block(x, time.flip(0))).abs().max() > 1e-3
    net, (z, u) = tiny(width=width), batch()
    assert (net(z, u) - net(z, u.flip(0))).abs().max() > 1e-5


@pytest.mark.parametrize('attention, where', [('all', ['down.0', 'down.1', 'mid.0', 'up.0', 'up.1']), ('mid', ['mid.0']), ('none', []), ((), ['mid.0']), ('1', ['down.1', 'mid.0', 'up.0']), ((0,), ['down.0', 'mid.0', 'up.1'])])
def test_attention_is_where_it_was_asked_for(attention, where):
    net = tiny(attention=attention)
    assert ['.'.join(name.split('.')[:2]) for name, m in net.named_modules() if isinstance(m, AttentionBlock)] == where


@pytest.mark.parametrize('heads', [1, 2, 4])
def test_attention_block_is_the_formula_and_knows_no_places(heads):
    block, x = awake(AttentionBlock(8, heads)).double(), torch.randn(2, 8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = block.norm(x).flatten(2).mT
    q, k, v = (a.unflatten(2, (heads, -1)).transpose(1, 2) for a in block.qkv(pixels).chunk(3, -1))
    seen = (torch.softmax(q @ k.mT / (8 / heads)**0.5, -1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block(x), x + block.out(seen).mT.unflatten(2, (3, 5)), rtol=0, atol=1e-12)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    shuffled = block(x.flatten(2)[..., order].unflatten(2, (3, 5))).flatten(2)
    torch.testing.assert_close(shuffled, block(x).flatten(2)[..., order], rtol=0, atol=1e-12)


# --- the time embedding

def test_embedding_is_exact_to_float32_and_bounded():
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    i = torch.arange(8, dtype=torch.float64)
    angles = 1000 * u[:, None] * 10000**(-2 * i / 16)
    torch.testing.assert_close(time_embedding(u, 16), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(time_embedding(u.float(), 16).double(), time_embedding(u, 16), rtol=0, atol=3e-4)


def test_embedding_stays_in_float32_under_autocast():
    u = torch.arange(1000) / 1000
    exact = time_embedding(u, 32)
    with torch.autocast('cpu', torch.bfloat16):
        inside = time_embedding(u, 32)
        out = TimeEmbedding(32, 64)(u)
    assert exact.dtype == inside.dtype == torch.float32 and torch.equal(exact, inside) and time_embedding(u.bfloat16(), 32).dtype == torch.float32
    assert len(out.unique(dim=0)) == 1000


# --- precision, memory format, copies

def test_memory_formats_agree_in_value_and_gradient():
    net, (z, u) = tiny(attention='all').double(), (a.double() for a in batch())
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    out, other = net(z, u), last(z.contiguous(memory_format=torch.channels_last), u)
    assert other.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, other, rtol=0, atol=1e-12)
    out.square().sum().backward(); other.square().sum().backward()
    for p, q in zip(net.parameters(), last.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_autocast_returns_the_dtype_of_z_and_is_close():
    net, (z, u) = tiny(width=8, attention='all'), batch()
    exact = net(z, u)
    with torch.autocast('cpu', torch.bfloat16): out = net(z, u)
    assert out.dtype == torch.float32 and 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()
    out.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert copy.deepcopy(net).bfloat16()(z.bfloat16(), u.bfloat16()).dtype == torch.bfloat16


def test_a_deep_copy_is_equal_and_stands_alone():
    net, (z, u) = tiny(), batch()
    twin = copy.deepcopy(net)
    out = net(z, u)
    assert torch.equal(twin(z, u), out) and twin.options == net.options
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    assert torch.equal(net(z, u), out) and not twin(z, u).any()


def test_dropout_acts_in_training_only():
    net, (z, u) = tiny(dropout=0.5), batch()
    assert not torch.equal(net(z, u), net(z, u))
    net.eval()
    assert torch.equal(net(z, u), net(z, u))


def test_the_graph_is_whole_for_the_compiler():
    "one graph, no breaks; run by a backend that needs no C compiler"
    net, (z, u) = tiny(attention='all'), batch()
    compiled = torch.compile(net, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(z, u), net(z, u))
    with pytest.raises(ValueError, match='cannot be halved'): net(z[..., :7], u)


def test_names_of_the_parameters_stay():
    "checkpoints are read by these names"
    names = list(tiny(attention='all', multipliers=(1, 2)).state_dict())
    assert names[:10] == ['time.layers.0.weight', 'time.layers.0.bias', 'time.layers.2.weight', 'time.layers.2.bias', 'first.weight', 'first.bias',
                          'down.0.layers.0.first.0.weight', 'down.0.layers.0.first.0.bias', 'down.0.layers.0.first.2.weight', 'down.0.layers.0.first.2.bias']
    parts = {'.'.join(n.split('.')[:-1]) for n in names}
    assert parts >= {'down.0.halve', 'down.1.layers.0.residual', 'down.0.layers.0.time.1', 'down.0.layers.0.second.3', 'down.0.layers.1.norm', 'down.0.layers.1.qkv', 'down.0.layers.1.out',
                     'mid.0.layers.2.first.2', 'up.1.doubled.1', 'up.0.layers.0.residual', 'last.0', 'last.2'}
    assert len(names) == 110


# --- wrong input

@pytest.mark.parametrize('bad, message', [
    (dict(width=0), 'width must be at least 2'), (dict(width=2.5), 'whole number'), (dict(channels=0), 'channels'), (dict(layers=0), 'layers'), (dict(mid=-1), 'mid'),
    (dict(multipliers=()), 'multipliers must be at least one'), (dict(multipliers=''), 'multipliers must be at least one'), (dict(multipliers='1, two'), "'1, two'"), (dict(multipliers=(1, 0)), 'multipliers'),
    (dict(attention='al'), "Did you mean 'all'"), (dict(attention='9'), 'numbered from 0 to 1'), (dict(attention=(0, 2)), 'numbered from 0 to 1'), (dict(attention=(-1,)), 'attention'),
    (dict(heads=3), '3 heads do not divide 8 channels'), (dict(halvings=3), 'halvings must be from 0 to 2'), (dict(dropout=1.5), 'dropout')])
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message): tiny(**bad)


@pytest.mark.parametrize('bad', [dict(width='wide'), dict(multipliers=None), dict(multipliers=(1, 'a')), dict(heads=True), dict(attention=1j)])
def test_bad_types(bad):
    with pytest.raises(TypeError): tiny(**bad)


@pytest.mark.parametrize('shape', [(3, 2), (3, 1, 8, 8), (2, 8, 8)])
def test_data_that_are_no_such_images(shape):
    with pytest.raises(ValueError, match=r'images of shape \(n, 2, H, W\), not \(' + str(shape[0])): tiny()(torch.zeros(shape), torch.zeros(shape[0]))


@given(st.integers(0, 5), st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_sizes_are_taken_exactly_when_they_can_be_halved(halvings, height, width):
    a, b, fits = height, width, True
    for _ in range(halvings): fits, a, b = fits and a % 2 == b % 2 == 0, a // 2, b // 2
    if fits: return require_size(dict(halvings=halvings), height, width)
    with pytest.raises(ValueError) as error: require_size(dict(halvings=halvings), height, width)
    text = str(error.value)
    assert f'{height}×{width}' in text and f'halved {halvings} times' in text
    near = [tuple(map(int, size.split('×'))) for size in text.split('nearest sizes: ')[1].split('. Or')[0].split(' and ')]
    for h, w in near:
        require_size(dict(halvings=halvings), h, w)
        assert abs(h - height) < 2**halvings and abs(w - width) < 2**halvings
    most = int(text.split('halvings=')[1].split()[0].rstrip('.'))
    require_size(dict(halvings=most), height, width)
    with pytest.raises(ValueError): require_size(dict(halvings=most + 1), height, width)


# --- by name

@pytest.mark.parametrize('name', UNETS)
def test_presets(name):
    with torch.device('meta'):
        net = unet(name, 3, 32)
        assert net(torch.empty(2, 3, 32, 32), torch.empty(2)).shape == (2, 3, 32, 32)
    low, high = dict(small=(1e5, 2.5e5), ddpm=(30e6, 40e6), thesis=(20e6, 100e6))[name]
    assert low < parameters(net) < high
    if name == 'thesis':
        assert (len(net.down), len(net.mid), len(net.up)) == (4, 3, 4)
        assert all(sum(isinstance(m, kind) for m in block.layers) == 6 for block in [*net.down, *net.up] for kind in (ResBlock, AttentionBlock))
        assert all([type(m) for m in block.layers] == [ResBlock] + [AttentionBlock, ResBlock] * 6 for block in net.mid)


def test_words_with_options():
    net = unet("small(width=4, multipliers='1, 2', halvings=1, attention='0')", 1, (6, 10))
    assert (net.options['width'], net.options['multipliers'], net.options['attention'], net.options['channels']) == (4, (1, 2), (0,), 1)
    assert net(*batch(1, 1, 6, 10)).shape == (1, 1, 6, 10)


@pytest.mark.parametrize('words, size, message', [
    ('smal', 16, "Did you mean 'small'"), ('small(wdth=3)', 16, "Did you mean 'width'"), ('small(channels=3)', 16, "unknown option of small: 'channels'"), ('small(3)', 16, 'width'),
    ('small(width=0)', 16, 'width must be'), ('small', 10, 'nearest sizes: 8×8 and 12×12'), ('thesis', (32, 24), 'halvings=3 or less')])
def test_wrong_words_and_sizes(words, size, message):
    with pytest.raises(ValueError, match=message): unet(words, 1, size)


def test_the_presets_stay_what_runs_know_them_by():
    "A run's name holds the preset's, not its options. Changed ones need a name of their own, or a new RESULTS_VERSION."
    assert UNETS == {'small': dict(width=16, multipliers='1, 1, 2', layers=1, halvings=2, attention='mid', mid=1),
                     'thesis': dict(width=64, multipliers='1, 2, 3, 4', layers=6, halvings=4, attention='all', mid=3, heads=4),
                     'ddpm': dict(width=128, multipliers='1, 2, 2, 2', layers=2, halvings=3, attention='1', mid=3)}
