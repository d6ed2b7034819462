"""Trained networks on disk, by Orbax.

A checkpoint appears under its name only when it is whole, so a process that is killed
while it writes leaves none behind.
"""

import pathlib

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


def save(path: pathlib.Path, tree: PyTree) -> None:
    """Stores a pytree of arrays, in place of what is stored at ``path``."""
    # Arrays that Orbax puts on a device are bound to it, and functions that are called
    # with them compile anew; what is stored from NumPy comes back as NumPy.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), jax.device_get(tree), force=True)


def restore(path: pathlib.Path, like: PyTree) -> PyTree:
    """Returns the pytree of NumPy arrays that is stored at ``path``.

    Args:
        path: the checkpoint.
        like: its structure, shapes and dtypes; arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not fit ``like``.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)
