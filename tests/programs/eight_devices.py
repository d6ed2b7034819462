"""Selects on eight devices and prints what came out as one line of JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune

SHAPES = [(64, 32), (3, 3, 16, 8), (40,), (4, 16, 8)]
SPECS = [P("x", "y"), P(None, None, "x", None), P("y"), P(None, "y", "x")]
STACKS = [None, None, None, 0]
KEEP = {"together": [777], "each": [100, 200, 3, 40], "stack": [9, 800, 40, 1, 2, 3, 4]}


def largest(scores, k):
    order = np.argsort(-scores.ravel(), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[:k]] = True
    return mask


def expected(arrays, groups):
    keep = KEEP[groups]
    if groups == "together":
        return largest(np.concatenate([x.ravel() for x in arrays]), keep[0])
    layers = [
        list(x) if groups == "stack" and axis == 0 else [x]
        for x, axis in zip(arrays, STACKS, strict=True)
    ]
    flat = [layer for own in layers for layer in own]
    return np.concatenate([largest(x, k) for x, k in zip(flat, keep, strict=True)])


def collectives(text):
    found = re.findall(r"= (\S.*?) (all-\w+|reduce-scatter|collective-\w+)\(", text)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
        for shape, name in found
        if name.startswith("all-reduce")
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    ]
    others = [name for _, name in found if not name.startswith("all-reduce")]
    return max(sizes, default=0), others


def flatten(masks):
    return np.concatenate([np.asarray(mask).ravel() for mask in masks])


def main():
    rng = np.random.default_rng(0)
    arrays = [np.round(rng.normal(size=s), 1).astype(np.float32) for s in SHAPES]
    report = {}
    for axes in ("Auto", "Explicit"):
        kind = (getattr(AxisType, axes),) * 2
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kind)
        with jax.set_mesh(mesh):
            shardings = [NamedSharding(mesh, spec) for spec in SPECS]
            placed = [
                jax.device_put(x, s) for x, s in zip(arrays, shardings, strict=True)
            ]
            for groups, keep in KEEP.items():
                run = jax.jit(
                    lambda scores, keep, groups=groups: jprune.selection.select(
                        scores,
                        keep,
                        together=groups == "together",
                        stacks=STACKS if groups == "stack" else None,
                    )
                )
                masks = run(placed, jnp.array(keep))
                text = run.lower(placed, jnp.array(keep)).compile().as_text()
                largest_all_reduce, others = collectives(text)
                report[f"{axes}/{groups}"] = {
                    "wrong": int((flatten(masks) != expected(arrays, groups)).sum()),
                    "groups": len(keep),
                    "largest_all_reduce": largest_all_reduce,
                    "other_collectives": others,
                    "moved": moved(masks, shardings),
                }
    report["prune"] = prune(placed, arrays, shardings, mesh)
    for axes in ("Auto", "Explicit"):
        report[f"{axes}/rigl"] = rigl(axes)
    print(json.dumps(report))


def moved(masks, shardings):
    return [
        f"{mask.sharding} {expected}"
        for mask, expected in zip(masks, shardings, strict=True)
        if not mask.sharding.is_equivalent_to(expected, mask.ndim)
    ]


def prune(placed, arrays, shardings, mesh):
    with jax.set_mesh(mesh):
        run = jax.jit(lambda scores: jprune.prune(scores, 0.75))
        masks = run(placed)
        others = collectives(run.lower(placed).compile().as_text())[1]
    # The leaf of rank 1 is never pruned.
    chosen = [0, 1, 3]
    total = sum(arrays[i].size for i in chosen)
    line = np.concatenate([arrays[i].ravel() for i in chosen])
    right = largest(line, jprune.selection.keep_count(total, 0.75))
    return {
        "wrong": int((flatten([masks[i] for i in chosen]) != right).sum()),
        "other_collectives": others,
        "moved": moved([masks[i] for i in chosen], [shardings[i] for i in chosen]),
    }


def rigl(axes):
    """Trains sharded and on one device: the same masks, and no weights on the move."""
    rng = np.random.default_rng(1)
    shapes = {"fc1": (32, 64), "fc2": (64, 16)}
    specs = {"fc1": P("x", "y"), "fc2": P("y", "x")}
    params, grads = (
        {
            name: {"kernel": rng.normal(size=shape).astype(np.float32)}
            for name, shape in shapes.items()
        }
        for _ in range(2)
    )
    start = jprune.prune(jax.tree.map(np.abs, params), 0.8)
    method = jprune.rigl(masks=start, every=2, end=9)
    tx = jprune.sparse(optax.chain(method, optax.adam(1e-2)))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params, grads):
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(step)
        for _ in range(7):
            params, state = compiled(params, state, grads)
        masks = [mask["kernel"] for mask in jprune.masks_of(state).values()]
        return masks, compiled.lower(params, state, grads).compile().as_text()

    kind = (getattr(AxisType, axes),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kind)
    expected, _ = train(jax.tree.map(jnp.asarray, params), grads)
    with jax.set_mesh(mesh):
        shardings = {
            name: {"kernel": NamedSharding(mesh, spec)} for name, spec in specs.items()
        }
        found, text = train(*(jax.device_put(x, shardings) for x in (params, grads)))
    before = flatten(mask["kernel"] for mask in start.values())
    return {
        "wrong": int((flatten(found) != flatten(expected)).sum()),
        "changed": int((flatten(expected) != before).sum()),
        "other_collectives": collectives(text)[1],
        "largest_all_reduce": collectives(text)[0],
    }


if __name__ == "__main__":
    main()
