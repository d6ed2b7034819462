"""Sparse training written out in NumPy, with a sort for every choice.

A network of two layers on a least-squares problem; nothing here knows the library.
"""

import itertools

import numpy as np


def problem(seed=0, sizes=(10, 16, 6), examples=32):
    """Returns parameters, and the data of a small regression."""
    rng = np.random.default_rng(seed)
    params = {
        f"fc{i}": {"kernel": rng.normal(size=(a, b)) / np.sqrt(a), "bias": np.zeros(b)}
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    x, y = (rng.normal(size=(examples, n)) for n in (sizes[0], sizes[-1]))
    return params, (x, y)


def gradients(params, batch):
    """Returns the gradient of the mean squared error of a tanh network."""
    x, y = batch
    h = np.tanh(x @ params["fc0"]["kernel"] + params["fc0"]["bias"])
    d_out = 2 * (h @ params["fc1"]["kernel"] + params["fc1"]["bias"] - y) / y.size
    d_h = (d_out @ params["fc1"]["kernel"].T) * (1 - h**2)
    return {
        "fc0": {"kernel": x.T @ d_h, "bias": d_h.sum(0)},
        "fc1": {"kernel": h.T @ d_out, "bias": d_out.sum(0)},
    }


def largest(scores, k):
    """Returns the mask of the k largest, ties to the lower index."""
    order = np.argsort(-scores.ravel(), kind="stable")[:k]
    mask = np.zeros(scores.size, bool)
    mask[order] = True
    return mask.reshape(scores.shape)


class Adam:
    """Adam, one parameter at a time."""

    def __init__(self, rate, shape):
        self.rate, self.count = rate, 0
        self.m, self.v = np.zeros(shape), np.zeros(shape)

    def step(self, g):
        """Returns the change of the parameter."""
        self.count += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9**self.count), self.v / (1 - 0.999**self.count)
        return -self.rate * m / (np.sqrt(v) + 1e-8)

    def reset(self, where):
        """Starts afresh where told."""
        self.m[where] = self.v[where] = 0.0


class Momentum:
    """SGD with heavy-ball momentum."""

    def __init__(self, rate, shape):
        self.rate, self.trace = rate, np.zeros(shape)

    def step(self, g):
        """Returns the change of the parameter."""
        self.trace = 0.9 * self.trace + g
        return -self.rate * self.trace

    def reset(self, where):
        """Starts afresh where told."""
        self.trace[where] = 0.0


def rigl_masks(weight, gradient, mask, fraction):
    """Returns RigL's next mask of a layer."""
    dropped = int(np.floor(fraction * mask.sum()))
    keep = largest(np.where(mask, np.abs(weight), -1.0), mask.sum() - dropped)
    return keep | largest(np.where(keep, -1.0, np.abs(gradient)), dropped)


def set_masks(weight, growth, mask, zeta):
    """Returns SET's next mask of a layer; ``growth`` orders the dead weights."""
    keep = mask.copy()
    for sign in (1, -1):
        side = mask & (sign * weight > 0)
        dropped = int(np.floor(zeta * side.sum()))
        keep &= ~largest(np.where(side, -sign * weight, -np.inf), dropped)
    return keep | largest(np.where(mask, -1.0, growth), mask.sum() - keep.sum())


def train(params, batch, masks, optimizer, steps, due, next_mask, *, hold):
    """Trains with masks; returns the parameters and the masks of every step.

    Args:
        params: kernels and biases by layer.
        batch: the data.
        masks: of the kernels, by layer.
        optimizer: shape -> an optimiser of one parameter.
        steps: the number of steps.
        due: step -> whether masks change.
        next_mask: (step, layer, weight, gradient, mask) -> mask.
        hold: whether a mask update takes no gradient step.
    """
    params = {
        layer: {"kernel": p["kernel"] * masks[layer], "bias": p["bias"].copy()}
        for layer, p in params.items()
    }
    moments = {
        (layer, name): optimizer(value.shape)
        for layer, p in params.items()
        for name, value in p.items()
    }
    history = []
    for t in range(steps):
        grads = gradients(params, batch)
        if due(t):
            for layer in masks:
                args = params[layer]["kernel"], grads[layer]["kernel"], masks[layer]
                new = next_mask(t, layer, *args)
                changed = new != masks[layer]
                params[layer]["kernel"][~new] = 0.0
                moments[layer, "kernel"].reset(changed | ~new)
                masks = masks | {layer: new}
        history.append(masks)
        if due(t) and hold:
            continue
        for (layer, name), moment in moments.items():
            g = grads[layer][name]
            if name == "kernel":
                change = moment.step(g * masks[layer]) * masks[layer]
            else:
                change = moment.step(g)
            params[layer][name] = params[layer][name] + change
    return params, history
