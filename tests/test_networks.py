"Attempts to break lfdm.networks: what a network sees, stacks against their networks, wrong sizes."
import pytest
import torch
from torch import nn

from lfdm.networks import MLP, StackedMLP
from trained import new_net, same

close = torch.testing.assert_close


def points(m, n=7, dim=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(m, n, dim, generator=g), torch.rand(m, n, generator=g)


def linears(net): return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("dim, width, depth", [(1, 1, 2), (5, 8, 4)])
def test_layers_by_hand(dim, width, depth):
    "the time enters centred; ReLU between the layers and not after the last"
    net, ((z,), (u,)) = MLP(dim, width, depth), points(1, dim=dim)
    h = torch.cat([z, 2 * u[:, None] - 1], 1)
    for i, layer in enumerate(linears(net)): h = layer(h.clamp_min(0) if i else h)
    assert [layer.out_features for layer in linears(net)] == [width] * (depth - 1) + [dim]
    close(net(z, u), h)


@pytest.mark.parametrize("make, words", [
    (lambda: MLP(width=0), "width must be at least 1"), (lambda: MLP(depth=1), "depth must be at least 2"),
    (lambda: StackedMLP([MLP(), MLP(width=7)]), "one shape"),
    (lambda: StackedMLP([MLP(), nn.Linear(2, 2)]), "nets must be MLPs, not"),
    (lambda: StackedMLP([MLP(2, 4)]).alone(-1), "m must be from 0 to 0, not -1"),
    (lambda: StackedMLP([MLP(2, 4)]).network(1), "m must be from 0 to 0, not 1")])
def test_what_is_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words): make()


@pytest.mark.parametrize("m, sizes", [(1, (2, 16)), (3, (3, 8, 2))])
def test_a_stack_gives_the_gradients_of_its_networks(m, sizes):
    nets, (z, u) = [MLP(*sizes) for _ in range(m)], points(m, dim=sizes[0])
    stack = StackedMLP(nets)
    stack(z, u).square().mean((1, 2)).sum().backward()
    for i, net in enumerate(nets):
        net(z[i], u[i]).square().mean().backward()
        for layer, w, b in zip(linears(net), stack.weights, stack.biases, strict=True):
            close(w.grad[i].T, layer.weight.grad, rtol=1e-4, atol=1e-6)
            close(b.grad[i, 0], layer.bias.grad, rtol=1e-4, atol=1e-6)


def test_a_stack_copies_and_alone_does_not():
    "what comes in and what `network` gives out are copies; `alone` follows the stack; nothing is random"
    nets, (z, u), random = [new_net(m) for m in range(2)], points(2), torch.get_rng_state()
    stack = StackedMLP(nets)
    out, alone = stack.network(1), stack.alone(1)
    assert torch.equal(random, torch.get_rng_state())
    for p in stack.parameters(): p.data.zero_()
    assert alone(z[1], u[1]).abs().max() == 0 and same(out, nets[1]) and out(z[1], u[1]).abs().max() > 0
