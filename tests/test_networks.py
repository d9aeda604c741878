"Attempts to break lfdm.networks: what a network sees, stacks against their networks, wrong sizes."
import pytest
import torch
from torch import nn

from lfdm.networks import MLP, StackedMLP

torch.set_num_threads(1)
close = torch.testing.assert_close


def seeded(m, *sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(m)
        return MLP(*sizes)


def points(m, n=7, dim=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(m, n, dim, generator=g), torch.rand(m, n, generator=g)


@pytest.mark.parametrize('dim, width, depth', [(1, 1, 2), (2, 16, 3), (2, 128, 7), (5, 8, 4)])
def test_layers_by_hand(dim, width, depth):
    "the time enters centred; ReLU between the layers and not after the last; the default is the thesis's"
    net, ((z,), (u,)) = seeded(0, dim, width, depth), points(1, 7, dim)
    h = torch.cat([z, 2 * u[:, None] - 1], 1)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    for i, layer in enumerate(linears): h = layer(h.clamp_min(0) if i else h)
    assert len(linears) == depth and {m.in_features for m in linears[1:]} == {width}
    close(net(z, u), h)
    assert sum(p.numel() for p in MLP().parameters()) == sum(p.numel() for p in MLP(2, 128, 7).parameters())


@pytest.mark.parametrize('options, words', [
    (dict(dim=0), 'dim must be at least 1'), (dict(width=0), 'width must be at least 1'),
    (dict(depth=1), 'depth must be at least 2'), (dict(width=2.5), 'width must be a whole number'),
    (dict(width='8'), 'width must be a whole number'), (dict(depth=True), 'depth must be a whole number')])
def test_sizes_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words): MLP(**options)


@pytest.mark.parametrize('sizes', [(2, 16), (3, 8, 2), (1, 1, 5)], ids=str)
@pytest.mark.parametrize('m', [1, 2, 5])
def test_a_stack_gives_values_and_gradients_of_its_networks(m, sizes):
    nets, (z, u) = [seeded(i, *sizes) for i in range(m)], points(m, dim=sizes[0])
    stack = StackedMLP(nets)
    assert len(stack) == m
    stack(z, u).square().mean((1, 2)).sum().backward()
    for i, net in enumerate(nets):
        y = net(z[i], u[i])
        y.square().mean().backward()
        close(stack(z, u)[i], y, rtol=1e-5, atol=1e-6)
        close(stack.alone(i)(z[i], u[i]), y, rtol=1e-5, atol=1e-6)
        linears = [layer for layer in net.layers if isinstance(layer, nn.Linear)]
        for layer, w, b in zip(linears, stack.weights, stack.biases, strict=True):
            close(w.grad[i].T, layer.weight.grad, rtol=1e-4, atol=1e-6)
            close(b.grad[i, 0], layer.bias.grad, rtol=1e-4, atol=1e-6)


def test_a_stack_copies_and_alone_does_not():
    "what comes in and what `network` gives out are copies; `alone` follows the stack; nothing is random"
    nets, (z, u) = [seeded(i, 2, 8) for i in range(2)], points(2)
    state = torch.get_rng_state()
    stack = StackedMLP(nets)
    out, alone = stack.network(1), stack.alone(1)
    assert torch.equal(state, torch.get_rng_state())
    for p in stack.parameters(): p.data.zero_()
    assert alone(z[1], u[1]).abs().max() == 0
    for a, b in zip(out.parameters(), nets[1].parameters(), strict=True): assert torch.equal(a, b)
    assert out(z[1], u[1]).abs().max() > 0


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_network_that_diverged_leaves_the_others_alone(bad):
    nets, (z, u) = [seeded(i, 2, 8) for i in range(3)], points(3)
    well, ill = StackedMLP(nets), StackedMLP(nets)
    with torch.no_grad(): ill.weights[0][1] = bad
    for stack in (well, ill): stack(z, u).square().mean((1, 2)).sum().backward()
    for a, b in zip(well.parameters(), ill.parameters()): assert torch.equal(a.grad[[0, 2]], b.grad[[0, 2]])
