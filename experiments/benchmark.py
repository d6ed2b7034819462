"""Speed, as ratios that mean the same on another machine.

``python -m experiments.benchmark`` measures everything in this one process. The
functions that a ratio compares run in turn, and the medians of many turns are divided,
so that a change in the machine's speed falls on both. Each line shows the ratio of wall
times, that of CPU times, and the bound that the wall ratio is to meet (where a line
says so, that of CPU times).

Sections: ``selection``, ``scoring``, ``training``, ``sparse_training``,
``compilation``, ``structure``.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from absl import app, flags
from jaxtyping import PyTree

import jprune
from experiments import fit, results
from experiments.task import Budget, Task
from experiments.tasks import _image, _models

Thunk = Callable[[], Any]


class Times(NamedTuple):
    """The medians of a function's times, in seconds."""

    wall: float
    cpu: float


class Row(NamedTuple):
    """A line of the report: a figure, and the bound that it is to meet.

    Attributes:
        name: what is compared.
        wall: the figure from wall times.
        cpu: the same from CPU times.
        bound: what ``wall`` should not exceed; or not fall below, if ``at_least``.
        unit: of all three; a ratio if empty.
        at_least: which way the bound works.
        of_cpu: whether the bound is one on ``cpu``.
    """

    name: str
    wall: float
    cpu: float
    bound: float | None = None
    unit: str = ""
    at_least: bool = False
    of_cpu: bool = False

    @property
    def met(self) -> str:
        """Whether the bound is met, in a word."""
        if self.bound is None:
            return ""
        figure = self.cpu if self.of_cpu else self.wall
        good = figure >= self.bound if self.at_least else figure <= self.bound
        return "met" if good else "not met"


def interleaved(thunks: Mapping[str, Thunk], repeats: int) -> dict[str, Times]:
    """Runs functions in turn and returns the medians of their times.

    Args:
        thunks: functions without arguments; the time until their results are ready
            counts. Each is called once before, to compile.
        repeats: how many turns.

    Example:
        >>> times = interleaved({"sum": lambda: jnp.ones(9).sum()}, repeats=3)
        >>> times["sum"].wall > 0
        True
    """
    for thunk in thunks.values():
        jax.block_until_ready(thunk())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in thunks}
    for _ in range(repeats):
        for name, thunk in thunks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(thunk())
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Times(*(float(np.median(x)) for x in zip(*pairs, strict=True)))
        for name, pairs in found.items()
    }


def ratio(name: str, a: Times, b: Times, bound: float | None, **rest: Any) -> Row:
    """Returns the line that says how many times as long ``a`` took as ``b``."""
    return Row(name, a.wall / b.wall, a.cpu / max(b.cpu, 1e-9), bound, **rest)


def selection(repeats: int = 15) -> Iterator[Row]:
    """Exact top 10 %, masks included, against a sum, a sort and a partition."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(np.abs(rng.normal(size=25_000_000)), jnp.float32)
    total = jax.jit(jnp.sum)
    top = jax.jit(jprune.selection.top_k)
    k = jnp.int32(2_500_000)
    host = np.asarray(scores)
    fast = interleaved(
        {"sum": lambda: total(scores), "top": lambda: top(scores, k)}, repeats
    )
    slow = interleaved(
        {
            "top": lambda: top(scores, k),
            "sort": lambda: jnp.sort(scores),
            "partition": lambda: np.partition(host, -2_500_000),
        },
        3,
    )
    million = "top 10 % of 25 million"
    yield ratio(f"{million} / jnp.sum", fast["top"], fast["sum"], 25)
    yield ratio(f"jnp.sort / {million}", slow["sort"], slow["top"], 30, at_least=True)
    yield ratio(f"np.partition / {million}", slow["partition"], slow["top"], None)
    tree = {
        f"fc{i}": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for i, shape in enumerate(((784, 300), (300, 100), (100, 10)))
    }
    leaves = [leaf.value for leaf in jprune.trees.prunable_leaves(tree)]
    together = jax.jit(functools.partial(jprune.selection.select, together=True))
    one = scores[:1_000_000]
    small = interleaved(
        {
            "million": lambda: top(one, jnp.int32(100_000)),
            "lenet": lambda: together(leaves, jnp.array([26_620])),
        },
        5 * repeats,
    )
    for name, label, bound in (
        ("million", "top 10 % of 1 million", 2.5),
        ("lenet", "top 10 % of LeNet-300-100", 1.5),
    ):
        wall, cpu = (1e3 * x for x in small[name])
        yield Row(label, wall, cpu, bound, unit="ms")


def _network(name: str) -> tuple[Callable, Callable, PyTree, tuple, Callable]:
    """Returns apply_fn, loss_fn, parameters, a batch of 64 and the loss on logits."""
    model, shape = {
        "LeNet-300-100": (_models.lenet_300_100(), (28, 28, 1)),
        "VGG-11-BN": (_models.vgg11(), (32, 32, 3)),
        "VGG-16-BN": (_models.vgg16(), (32, 32, 3)),
    }[name]
    init, apply = _image.pure(model, shape)
    params, state = init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, *shape)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, 64))

    def apply_fn(params, x):
        return apply(params, state, x, train=False)[0]

    def objective(logits, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses)

    def loss_fn(params, batch):
        return objective(apply_fn(params, batch[0]), batch[1])

    return apply_fn, loss_fn, params, (x, y), objective


def scoring(repeats: int = 15) -> Iterator[Row]:
    """Criteria at batch 64, in units of a forward and a backward pass of the batch."""
    bounds = {"LeNet-300-100": 120, "VGG-11-BN": 10}
    for name, flow_bound in bounds.items():
        apply_fn, loss_fn, params, batch, objective = _network(name)
        gradient = jax.jit(jax.value_and_grad(loss_fn))
        snip = jax.jit(jprune.scores.snip(loss_fn))
        grasp = jax.jit(jprune.scores.grasp(apply_fn, loss=objective))
        plain = jax.jit(_sensitivity(loss_fn))
        synflow = jprune.scores.synflow(apply_fn)
        thunks = {
            "pass": functools.partial(gradient, params, batch),
            "plain": functools.partial(plain, params, batch),
            "SNIP": functools.partial(snip, params, batch),
            "GraSP": functools.partial(grasp, params, batch),
        }
        once = interleaved(thunks, repeats if name == "VGG-11-BN" else 10 * repeats)
        rounds = interleaved(
            {
                "pass": thunks["pass"],
                "SynFlow": lambda fn=synflow, params=params, x=batch[0][:1]: (
                    jprune.prune_iteratively(fn, params, x, 0.99, rounds=100)
                ),
            },
            max(repeats // 3, 3),
        )
        unit = f"forward + backward, {name}"
        yield ratio(f"SNIP / {unit}", once["SNIP"], once["pass"], 1.1)
        label = f"abs(w * jax.grad(loss)(w)) / {unit}"
        yield ratio(label, once["plain"], once["pass"], None)
        yield ratio(f"GraSP / {unit}", once["GraSP"], once["pass"], 3.2)
        label = f"SynFlow, 100 rounds with selection / {unit}"
        yield ratio(label, rounds["SynFlow"], rounds["pass"], flow_bound)


def _sensitivity(loss_fn: Callable) -> Callable:
    """SNIP written out: what it costs without the library."""

    def scores(params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)

    return scores


def training(repeats: int = 60) -> Iterator[Row]:
    """A step of masked training against a dense one, batch 128, Adam."""
    networks = {
        "MLP, 1 million weights": (_models.MLP(hidden=(880, 340)), (784,), 1.07),
        "CNN, LeNet-5": (_models.lenet5_caffe(), (28, 28, 1), 1.05),
    }
    for name, (model, shape, bound) in networks.items():
        task = _toy_task(model, shape)
        tx = task.optimizer(1)
        params, state = task.init(jax.random.key(0))
        masks = jprune.prune(jprune.scores.magnitude(params), 0.9)
        sparse_step = jax.jit(fit.default_step(task, tx), donate_argnums=0)
        dense_step = jax.jit(_dense_step(task, tx), donate_argnums=0)
        batch = jax.tree.map(jnp.asarray, dict(task.streams["train"]))
        key = jax.random.key(1)
        sparse = jprune.apply_masks(params, masks)
        carries = {
            "masked": fit.Carry(sparse, state, tx.init(sparse), masks),
            "dense": (params, state, tx.init(params)),
        }
        steps = {"masked": sparse_step, "dense": dense_step}
        carries = jax.tree.map(jnp.array, carries)

        times = interleaved(
            {
                which: _advancing(step, carries[which], batch, key)
                for which, step in steps.items()
            },
            repeats,
        )
        yield ratio(
            f"masked / dense training step, {name}",
            times["masked"],
            times["dense"],
            bound,
        )


def _advancing(step: Callable, carry: PyTree, *rest: Any) -> Thunk:
    """Returns a function that makes the next step of training at every call."""

    def advance() -> PyTree:
        nonlocal carry
        carry, metrics = step(carry, *rest)
        return carry, metrics

    return advance


def _toy_task(model: Any, shape: tuple[int, ...]) -> Task:
    rng = np.random.default_rng(0)
    init, apply = _image.pure(model, shape)
    stream = {
        "x": rng.normal(size=(128, *shape)).astype(np.float32),
        "y": rng.integers(0, 10, 128).astype(np.int32),
    }
    return Task(
        name="benchmark",
        source="random numbers",
        init=init,
        apply=apply,
        per_example_loss=_image.cross_entropy,
        metrics=_image.accuracy,
        streams={"train": stream},
        optimizer=lambda steps: optax.adam(1e-3),
        budget=Budget(1, 128),
    )


def _dense_step(task: Task, tx: optax.GradientTransformation) -> Callable:
    """The step that training without masks would have."""

    def objective(params, state, batch, key):
        outputs, state = task.apply(params, state, batch["x"], train=True, key=key)
        value = jnp.mean(task.per_example_loss(outputs, batch))
        metrics = task.metrics(outputs, batch)
        measured = {name: jnp.mean(v) for name, v in metrics.items()}
        return value, (state, {"loss": value, **measured})

    def step(carry, batch, key):
        params, state, opt_state = carry
        differentiate = jax.grad(objective, has_aux=True)
        grads, (state, metrics) = differentiate(params, state, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), metrics

    return step


def sparse_training(repeats: int = 60) -> Iterator[Row]:
    """Steps and mask updates of methods that live in the optimiser."""
    never = 10**6
    methods = {
        "RigL": functools.partial(jprune.rigl, 0.9, every=never, end=2 * never),
        "SET": functools.partial(jprune.set_, 0.9, every=never),
    }
    networks = {
        "MLP, 1 million weights": (_models.MLP(hidden=(880, 340)), (784,), 1.10),
        "CNN, LeNet-5": (_models.lenet5_caffe(), (28, 28, 1), 1.05),
    }
    for name, (model, shape, bound) in networks.items():
        task = _toy_task(model, shape)
        params, state = task.init(jax.random.key(0))
        batch = jax.tree.map(jnp.asarray, dict(task.streams["train"]))
        adam = optax.adam(1e-3)
        txs = {"dense": adam} | _sparse_chains(methods, adam)
        steps = {
            which: _advancing(
                jax.jit(_dense_step(task, tx), donate_argnums=0),
                jax.tree.map(jnp.array, (params, state, tx.init(params))),
                batch,
                jax.random.key(1),
            )
            for which, tx in txs.items()
        }
        times = interleaved(steps, repeats)
        for which in methods:
            label = f"{which} / dense training step, {name}"
            yield ratio(label, times[which], times["dense"], bound)
    yield from _sparse_updates(methods, max(repeats // 4, 3))
    yield from _mask_updates(max(repeats // 12, 3))


def _sparse_chains(
    methods: Mapping[str, Callable], inner: optax.GradientTransformation
) -> dict[str, optax.GradientTransformation]:
    return {
        which: jprune.sparse(optax.chain(method(), inner))
        for which, method in methods.items()
    }


def _sparse_updates(methods: Mapping[str, Callable], repeats: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(2000, 2000)), jnp.float32) for _ in "ab"]
    params = {f"fc{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    adam = optax.adam(1e-3)
    txs = {"adam": adam} | _sparse_chains(methods, adam)
    thunks = {}
    for which, tx in txs.items():

        def update(carry, params, tx=tx):
            # As in a training step, the gradient's memory can be used again.
            return tx.update(*carry, params), ()

        carry = jax.tree.map(jnp.array, (params, tx.init(params)))
        thunks[which] = _advancing(jax.jit(update, donate_argnums=0), carry, params)
    times = interleaved(thunks, repeats)
    for which in methods:
        label = f"update of sparse({which}, Adam) / Adam's, 8 million weights"
        yield ratio(label, times[which], times["adam"], 1.5)


def _mask_updates(repeats: int) -> Iterator[Row]:
    params = resnet50_kernels()
    size = sum(kernel.size for kernel in jax.tree.leaves(params))
    tx = jprune.rigl(0.9, every=1, end=10**6)
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params)[1])
    state = tx.init(params)._replace(step=jnp.int32(1))
    grads = jax.tree.map(jnp.flip, params)
    times = interleaved({"rigl": lambda: update(grads, state, params)}, repeats)
    wall, cpu = (1e9 * x / size for x in times["rigl"])
    label = "RigL mask update per weight, ResNet-50 (bound on CPU time)"
    yield Row(label, wall, cpu, 15, unit="ns", of_cpu=True)


def compilation() -> Iterator[Row]:
    """The first call of a function: tracing and compiling, in seconds."""
    for name, bound in (("LeNet-300-100", 4), ("VGG-16-BN", 12)):
        apply_fn, _, params, (x, _), _ = _network(name)
        synflow = jprune.scores.synflow(apply_fn)

        def rounds(sparsity, fn=synflow, params=params, x=x[:1]):
            return jprune.prune_iteratively(fn, params, x, sparsity, rounds=100)

        label = f"compilation of SynFlow's 100 rounds, {name}"
        yield _compilation(label, rounds, bound)
    trees = {
        "ResNet-50": (resnet50_kernels(), 12),
        "LeNet-300-100": (_network("LeNet-300-100")[2], 1),
    }
    for name, (params, bound) in trees.items():
        scores = jax.tree.map(jnp.abs, params)
        prune = functools.partial(jprune.prune, scores)
        yield _compilation(f"compilation of prune, {name}", prune, bound)

    yield from _sparse_compilations()


def _sparse_compilations() -> Iterator[Row]:
    """What masks in the optimiser add to the compilation of a training step."""
    methods = {
        "RigL": functools.partial(jprune.rigl, 0.9),
        "SET": functools.partial(jprune.set_, 0.9, every=100),
    }
    adam = optax.adam(1e-3)
    txs = {"dense": adam} | _sparse_chains(methods, adam)
    task = _toy_task(_models.MLP(hidden=(880, 340)), (784,))
    params, state = task.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, dict(task.streams["train"]))
    kernels = resnet50_kernels()

    def step(tx):
        carry = params, state, tx.init(params)
        return jax.jit(_dense_step(task, tx)), (carry, batch, jax.random.key(1))

    def update(tx):
        return jax.jit(tx.update), (kernels, tx.init(kernels), kernels)

    for name, program, bound in (
        ("a step, MLP", step, 3),
        ("an update, ResNet-50", update, 20),
    ):
        times = {which: _compile_time(*program(tx)) for which, tx in txs.items()}
        for which in methods:
            wall, cpu = np.subtract(times[which], times["dense"])
            label = f"compilation of {name}: {which} less dense"
            yield Row(label, float(wall), float(cpu), bound, unit="s")


def _compile_time(function: Any, args: tuple) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    function.lower(*args).compile()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def _compilation(name: str, call: Callable[[float], Any], bound: float) -> Row:
    # The second call, at another sparsity, is what was not compilation.
    marks = []
    for sparsity in (0.9, 0.95):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(sparsity))
        marks.append((time.perf_counter() - wall, time.process_time() - cpu))
    first, second = marks
    return Row(name, first[0] - second[0], first[1] - second[1], bound, unit="s")


def resnet50_kernels() -> dict[str, dict[str, jax.Array]]:
    """Returns random kernels with the shapes of ResNet-50's 54."""
    shapes, width_in = [(7, 7, 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, width_in, width), (3, 3, width, width)]
            shapes += [(1, 1, width, 4 * width)]
            if block == 0:
                shapes += [(1, 1, width_in, 4 * width)]
            width_in = 4 * width
    shapes += [(2048, 1000)]
    rng = np.random.default_rng(0)
    return {
        f"layer{i:02d}": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for i, shape in enumerate(shapes)
    }


def structure(repeats: int = 25) -> Iterator[Row]:
    """Networks without half of their channels, at 224 x 224 pixels."""
    model = _models.imagenet_resnet(50)
    x = _images(1)
    variables = _random_variables(model, x)
    wall, cpu = _time_of_shrinking(model.apply, variables, x)
    yield Row("couplings + shrink, ResNet-50", wall, cpu, 10, unit="s")

    model, native = (_models.imagenet_resnet(18, width) for width in (64, 32))
    variables = _random_variables(model, x)
    small, small_variables = _half(model.apply, variables, x)
    # As many weights as the half network has, wherever they are.
    weights = _number_of_weights(small_variables)
    masks = jprune.prune(jprune.scores.magnitude(variables), keep=weights)
    zeros = jax.block_until_ready(jprune.apply_masks(variables, masks))

    def masked(variables, x):
        return model.apply(jprune.apply_masks(variables, masks), x)

    programs = {
        "dense": (jax.jit(model.apply), variables),
        "zeros": (jax.jit(model.apply), zeros),
        "masked": (jax.jit(masked), variables),
        "shrunk": (jax.jit(small), small_variables),
        "native": (jax.jit(native.apply), small_variables),
    }
    for batch in (1, 8):
        # The two share their weights: in a round with others, the second of them would
        # find these in the cache.
        thunks = {
            name: functools.partial(*programs[name], _images(batch))
            for name in ("native", "shrunk")
        }
        times = interleaved(thunks, 4 * repeats if batch == 1 else 2 * repeats)
        label = f"the same widths in Flax / shrunk ResNet-18, batch {batch}"
        yield ratio(label, times["native"], times["shrunk"], 0.95, at_least=True)
    thunks = {name: functools.partial(*programs[name], x) for name in programs}
    del thunks["native"]
    times = interleaved(thunks, 2 * repeats)
    yield from _latencies(times, weights / _number_of_weights(variables))


def _latencies(times: Mapping[str, Times], density: float) -> Iterator[Row]:
    """What a mask does for the latency, and what removed channels do."""
    what = f"ResNet-18, {density:.1%} of the weights, batch 1"
    for name, label in (
        ("dense", "ResNet-18, dense, batch 1"),
        ("zeros", f"{what}, unstructured, zeros in the kernels"),
        ("masked", f"{what}, unstructured, masked in the call"),
        ("shrunk", f"{what}, half of the channels, shrunk"),
    ):
        yield Row(label, *(1e3 * x for x in times[name]), unit="ms")
    for a, b in (
        ("zeros", "dense"),
        ("masked", "dense"),
        ("zeros", "shrunk"),
        ("dense", "shrunk"),
    ):
        yield ratio(f"{a} / {b}, {what}", times[a], times[b], None)


def _half(apply_fn: Callable, variables: PyTree, x: jax.Array) -> tuple:
    """Returns the function without half of the channels of each group."""
    units = jprune.couplings(apply_fn, variables, x)
    masks = jprune.prune(
        jprune.scores.magnitude(variables),
        0.5,
        units=units,
        allocation=jprune.allocation.uniform(),
    )
    return jprune.shrink(apply_fn, variables, masks, x)


def _time_of_shrinking(apply_fn: Callable, variables: PyTree, x: jax.Array) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    units = jprune.couplings(apply_fn, variables, x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # What is removed is no part of it.
    keeps = [jnp.arange(group.shape[0]) % 2 == 0 for group in units.groups]
    masks = jax.block_until_ready(jprune.units.expand(units, variables, keeps))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    jax.block_until_ready(jprune.shrink(apply_fn, variables, masks, x)[1])
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def _number_of_weights(variables: PyTree) -> int:
    return sum(leaf.size for leaf in jprune.trees.prunable_leaves(variables))


def _images(batch: int) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(batch, 224, 224, 3)), jnp.float32)


def _random_variables(model: Any, x: jax.Array) -> PyTree:
    """Variables as initialised, without compiling the initialisation."""
    rng = np.random.default_rng(0)

    def leaf(keys: Sequence[Any], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jprune.trees.path_of(keys).rpartition("/")[-1]
        if name == "kernel":
            deviation = np.sqrt(2 / np.prod(shape.shape[:-1]))
            return jnp.asarray(rng.normal(0, deviation, shape.shape), shape.dtype)
        return jnp.full(shape.shape, name in ("scale", "var"), shape.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


SECTIONS = {
    "selection": selection,
    "scoring": scoring,
    "training": training,
    "sparse_training": sparse_training,
    "compilation": compilation,
    "structure": structure,
}


def report(rows: Sequence[Row], console: rich.console.Console) -> None:
    """Prints the lines as a table, with where and when they were measured."""
    provenance = results.provenance()
    versions = ", ".join(f"{k} {v}" for k, v in provenance["versions"].items())
    table = rich.table.Table(caption=f"{results.now()}; {versions}")
    for name, align in (
        ("", "left"),
        ("wall", "right"),
        ("CPU", "right"),
        ("bound", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=align)
    for row in rows:
        sign = "" if row.bound is None else ">= " if row.at_least else "<= "
        bound = "" if row.bound is None else f"{sign}{row.bound:g} {row.unit}"
        wall, cpu = (f"{x:.3g} {row.unit}" for x in (row.wall, row.cpu))
        table.add_row(row.name, wall, cpu, bound, row.met)
    console.print(table)


def main(argv: Sequence[str]) -> None:
    """Measures the sections that the flag names."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    console = rich.console.Console(width=120)
    rows = []
    for name in flags.FLAGS.sections:
        for row in SECTIONS[name]():
            console.print(f"{row.name}: {row.wall:.3g} {row.unit}", highlight=False)
            rows.append(row)
    report(rows, console)


if __name__ == "__main__":
    flags.DEFINE_multi_enum(
        "sections", list(SECTIONS), list(SECTIONS), "What to measure."
    )
    app.run(main)
