"""The law on networks of every kind: shrunk == masked, in outputs and gradients.

Mutations that these tests catch: see each test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.tracing import nets

import jprune


def members(groups):
    return {f"{m.leaf.path}[{m.axis}]" for group in groups for m in group.members}


def channels_of(pinned):
    """What is pinned, without the spatial axes of kernels."""
    return {
        f"{member.leaf.path}[{member.axis}]"
        for group in pinned
        for member in group.members
        if not all("spatial axis" in reason for reason in group.reasons)
    }
