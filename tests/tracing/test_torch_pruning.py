"""Full-width networks of ImageNet against Torch-Pruning, at 50 % of the channels.

The golden file holds what Torch-Pruning found in torchvision's networks: which layers
make and read each group of coupled channels, and the shapes of all kernels after half
of every group was removed. Groups, kernels and parameters agree in all three networks,
layer by layer, with no exception. Nothing is computed: parameters are shapes.
"""

import collections
import json
import math
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import jprune
from jprune import allocation, trees
from tests.tracing import wide

FILE = pathlib.Path(__file__).parents[1] / "golden" / "torch_pruning.json"
GOLDEN = json.loads(FILE.read_text())
NETWORKS = {
    "resnet18": wide.resnet18,
    "resnet50": wide.resnet50,
    "vgg16_bn": wide.vgg16_bn,
}


class Half:
    """A network, its couplings, and what is left of it at half of all channels."""

    def __init__(self, name):
        module, self.golden = NETWORKS[name], GOLDEN[name]
        self.native = module.clone(width=module.width // 2)
        self.variables, self.x = wide.shapes(module, 224)
        self.units = jprune.couplings(module.apply, self.variables, self.x)
        scores = [jnp.arange(float(group.shape[0])) for group in self.units.groups]
        masks = jprune.prune(
            scores, 0.5, units=self.units, allocation=allocation.uniform()
        )
        self.small, self.small_variables = jprune.shrink(
            module.apply, self.variables, masks, self.x
        )


def kernels(variables):
    """The shapes of kernels, as torch has them: outputs first, then inputs."""
    found = {}
    for leaf in trees.leaves_of(variables):
        _, layer, name = leaf.path.split("/")
        if name == "kernel":
            *spatial, read, made = leaf.shape
            found[layer] = [made, read, *spatial]
    return found


def sides(group):
    """The layers that make a group's channels, and those that read them."""
    made, read = set(), set()
    for member in group.members:
        _, layer, name = member.leaf.path.split("/")
        if name == "kernel":
            last = member.axis == len(member.leaf.shape) - 1
            (made if last else read).add(layer)
    return frozenset(made), frozenset(read)


@pytest.fixture(scope="module", params=NETWORKS)
def half(request):
    return Half(request.param)


def parameters(variables):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def test_groups_are_the_same(half):
    expected = {
        (frozenset(group["out_layers"]), frozenset(group["in_layers"])): group[
            "channels"
        ]
        for group in half.golden["groups"]
    }
    found = {sides(group): group.shape[0] for group in half.units.groups}
    assert found == expected
    assert len(half.units.groups) == half.golden["n_groups"]


def test_only_inputs_and_outputs_are_pinned(half):
    """Torch-Pruning takes neither the image's channels nor the classes."""
    first, *_, last = half.golden["shapes_before_after"]
    found = {
        (member.leaf.path.split("/")[1], member.axis)
        for pinned in half.units.pinned
        for member in pinned.members
        if member.leaf.path.endswith("/kernel")
        and not all("spatial axis" in reason for reason in pinned.reasons)
    }
    assert found == {(first, 2), (last, 1)}


def test_kernels_have_the_same_shapes_before_and_after(half):
    golden = half.golden["shapes_before_after"]
    before, after = zip(*golden.values(), strict=True)
    assert kernels(half.variables) == dict(zip(golden, before, strict=True))
    found = kernels(half.small_variables)
    assert found == dict(zip(golden, after, strict=True))


def test_parameters_are_as_many_before_and_after(half):
    assert parameters(half.variables) == half.golden["params_before"]
    assert parameters(half.small_variables) == half.golden["params_after"]


def operations(fn, *args):
    """How often each primitive makes outputs of which shapes, whatever is nested."""

    def count(jaxpr):
        for equation in jaxpr.eqns:
            inner = [
                param.jaxpr
                for param in equation.params.values()
                if isinstance(param, jax.extend.core.ClosedJaxpr)
            ]
            shapes = tuple(var.aval.shape for var in equation.outvars)
            # A call is what it calls.
            if not inner:
                found[equation.primitive.name, shapes] += 1
            for nested in inner:
                count(nested)

    found = collections.Counter()
    closed = jax.make_jaxpr(fn)(*args)
    count(closed.jaxpr)
    return found, [var.shape for var in closed.out_avals]


def test_the_operations_are_those_of_the_same_widths_written_by_hand(half):
    """Nothing is added: the small network compiles to what it would have been."""
    found, outputs = operations(half.small, half.small_variables, half.x)
    expected, _ = operations(half.native.apply, half.small_variables, half.x)
    assert found == expected
    assert [list(shape) for shape in outputs] == [half.golden["out_shape"]]
