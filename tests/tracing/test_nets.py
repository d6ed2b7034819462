"""Networks of every kind: exact groups, exact pins, and the law.

Mutations that these tests catch: biases left out of their channels, heads that are not
tied, a group of a norm cut in part, a mean over the kept channels in place of all, a
dropout mask drawn at the small shape, a concatenation without its offset.
"""

import jax
import pytest

import jprune
from jprune import tracing
from tests.tracing import law, nets


@pytest.fixture(scope="module", params=nets.ALL, ids=lambda build: build.__name__)
def net(request):
    with jax.enable_x64(True):
        yield request.param()


@pytest.fixture(scope="module")
def units(net):
    return jprune.couplings(net.apply, net.variables, *net.inputs, **net.options)


def pinned_channels(units):
    """What is pinned, but for the spatial axes of kernels."""
    return {
        f"{member.leaf.path.removeprefix('params/')}[{member.axis}]"
        for pinned in units.pinned
        for member in pinned.members
        if not all("spatial axis" in reason for reason in pinned.reasons)
    }


def test_groups_and_what_is_pinned(net, units):
    assert sorted(group.shape[0] for group in units.groups) == sorted(net.groups)
    assert pinned_channels(units) == net.pinned


def test_shrunk_equals_masked(net, units):
    keeps = law.removals(units)
    shrinkable = sum(group.shape[0] > 1 for group in units.groups)
    assert sum(not keep.all() for keep in keeps) == shrinkable > 0
    _, params = law.check(
        net.apply, net.variables, net.inputs, keeps, units, **net.options
    )
    paths = [leaf.path for leaf in jprune.trees.leaves_of(net.variables)]
    assert [leaf.path for leaf in jprune.trees.leaves_of(params)] == paths


def test_summary_names_every_leaf(net, units):
    table = tracing.summary(units)
    for leaf in units.leaves:
        assert leaf.path in table
    assert all(reason in table for p in units.pinned for reason in p.reasons[:3])
