"""Schedules and cadences.

Mutations that these tests catch: ``step % every`` for the events (the golden tables
show where it misses the target), a curve trusted to land on its end, float32 on the
host.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import schedules
from jprune.types import Schedule

GOLDEN = json.loads(
    (Path(__file__).parent / "golden/jaxpruner/golden.json").read_text()
)["schedules"]
POLYNOMIAL = [
    pytest.param(e, id=f"{e['update_start_step']}-{e['update_end_step']}-{e['power']}")
    for e in GOLDEN
    if e["kind"] == "polynomial"
]

RAMPS = [
    schedules.linear,
    schedules.cubic,
    schedules.exponential,
    schedules.cosine,
]
ALL = [*RAMPS, schedules.gap_halving]

# The curves, written down once more as functions of the part of the way.
CURVES = {
    schedules.linear: lambda a, b, t: a + (b - a) * t,
    schedules.cubic: lambda a, b, t: b + (a - b) * (1 - t) ** 3,
    schedules.exponential: lambda a, b, t: 1 - (1 - a) * ((1 - b) / (1 - a)) ** t,
    schedules.cosine: lambda a, b, t: b + (a - b) * (1 + math.cos(math.pi * t)) / 2,
}

fractions = st.floats(0.0, 0.999)


@pytest.mark.parametrize("ramp", RAMPS)
@settings(deadline=None, max_examples=40)
@given(
    sparsity=fractions,
    initial=fractions,
    steps=st.integers(1, 10**6),
    start=st.integers(0, 10**6),
    data=st.data(),
)
def test_ramps_follow_their_formula(ramp, sparsity, initial, steps, start, data):
    schedule = ramp(sparsity, steps=steps, start=start, initial=initial)
    step = data.draw(st.integers(start, start + steps))
    t = (step - start) / steps
    np.testing.assert_allclose(
        schedule(step), CURVES[ramp](initial, sparsity, t), atol=1e-12
    )
    assert schedule(start - 1) == schedule(start)
    np.testing.assert_allclose(schedule(start), initial, atol=1e-12)


@pytest.mark.parametrize("ramp", ALL)
@settings(deadline=None, max_examples=40)
@given(sparsity=st.floats(0.5, 0.9999), steps=st.integers(1, 10**6))
def test_the_end_is_exact(ramp, sparsity, steps):
    schedule = ramp(sparsity, steps=steps, start=3)
    for step in (steps + 3, steps + 4, 2**31 - 1, np.inf):
        assert schedule(step) == sparsity


@pytest.mark.parametrize("ramp", ALL)
def test_the_end_is_exact_when_traced(ramp):
    for steps in (1, 7, 99_999):
        schedule = jax.jit(ramp(0.9, steps=steps, start=2))
        for step in (steps + 2, steps + 50):
            assert schedule(jnp.asarray(step)) == jnp.float32(0.9)


@pytest.mark.parametrize("ramp", ALL)
def test_schedules_rise(ramp):
    values = ramp(0.9, steps=50, start=5)(np.arange(70))
    assert np.all(np.diff(values) >= 0)
    assert values[5] == 0 and values[6] > 0


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("rounds", [1, 3, 60, 100])
def test_exponential_rounds_are_exact_powers(sparsity, rounds):
    schedule = schedules.exponential(sparsity, steps=rounds)
    density = 1 - sparsity
    for k in range(rounds):
        assert schedule(k) == 1 - density ** (k / rounds)
    assert schedule(rounds) == sparsity


def test_exponential_removes_the_same_part_of_what_is_left():
    schedule = schedules.exponential(1 - 0.8**5, steps=5)
    left = [1 - schedule(k) for k in range(6)]
    np.testing.assert_allclose(np.divide(left[1:], left[:-1]), 0.8, rtol=1e-12)


def test_cubic_is_flat_at_the_end():
    schedule = schedules.cubic(0.8, steps=1000)
    last = schedule(1000) - schedule(999)
    assert 0 < last < 1e-8


def test_gap_halving_halves_the_gap():
    schedule = schedules.gap_halving(0.98)
    expected = [0.0] + [0.98 - 0.48 * 0.5**i for i in range(6)] + [0.98]
    np.testing.assert_allclose(schedule(np.arange(8)), expected, rtol=1e-12)


def test_one_shot_jumps():
    schedule = schedules.one_shot(0.7, at=4)
    assert schedule(np.arange(6)).tolist() == [0, 0, 0, 0, 0.7, 0.7]
    assert schedules.one_shot(0.7)(0) == 0.7


@pytest.mark.parametrize("make", [schedules.one_shot, *ALL])
def test_host_is_float64_and_device_float32(make):
    extra = {} if make is schedules.one_shot else {"steps": 9}
    schedule = make(0.9, **extra)
    assert isinstance(schedule, Schedule)
    assert type(schedule(3)) is np.float64
    assert schedule(np.arange(4)).dtype == np.float64
    for step in (jnp.int32(3), jnp.float32(3)):
        value = jax.jit(schedule)(step)
        assert value.dtype == jnp.float32 and not value.weak_type
        np.testing.assert_allclose(value, schedule(3), rtol=1e-6)


def test_unsigned_steps_before_the_start_do_not_wrap_around():
    schedule = schedules.linear(0.9, steps=10, start=100)
    assert jax.jit(schedule)(jnp.uint32(3)) == 0
    events = schedules.cadence(schedule, every=10, start=100, end=110)
    assert jax.jit(events.sparsity)(jnp.uint32(3)) == 0
    assert not jax.jit(events.is_event)(jnp.uint32(90))


@pytest.mark.parametrize("entry", POLYNOMIAL)
def test_golden_polynomials(entry):
    start, end = entry["update_start_step"], entry["update_end_step"]
    if start == end:
        # The reference is at its target before its start too, where it has no event.
        schedule, first = schedules.one_shot(entry["target"], at=start), start
    else:
        # The reference is one step ahead: its first event already prunes.
        ramp = {1: schedules.linear, 3: schedules.cubic}[entry["power"]]
        schedule = ramp(entry["target"], steps=end - start, start=start - 1)
        first = 0
    steps = np.array(entry["steps"])
    later = steps >= first
    expected = np.array(entry["sparsity"])[later]
    np.testing.assert_allclose(schedule(steps[later]), expected, atol=1e-6)
    traced = jax.jit(schedule)(jnp.asarray(steps[later]))
    np.testing.assert_allclose(traced, expected, atol=1e-6)


@pytest.mark.parametrize("entry", POLYNOMIAL)
def test_golden_events(entry):
    start, end, every = (
        entry[f"update_{name}"] for name in ("start_step", "end_step", "freq")
    )
    ours = schedules.cadence(
        schedules.one_shot(entry["target"], at=end), every=every, start=start, end=end
    )
    steps = np.array(entry["steps"])
    expected = np.array(entry["is_update"])
    if start % every == 0:
        # The reference has no event at an end that its period misses.
        expected = expected | (steps == end)
        np.testing.assert_array_equal(ours.is_event(steps), expected)
    np.testing.assert_array_equal(
        jax.jit(ours.is_event)(jnp.asarray(steps)), ours.is_event(steps)
    )
    np.testing.assert_array_equal(
        steps[ours.is_event(steps)], np.intersect1d(ours.events, steps)
    )
    assert ours.sparsity(ours.events[-1]) == entry["target"]


def test_the_target_that_the_reference_misses():
    (entry,) = [
        e for e in GOLDEN if e["kind"] == "polynomial" and e["update_start_step"] == 5
    ]
    updates = np.array(entry["is_update"])
    assert np.array(entry["sparsity"])[updates].max() < 0.9 - 1e-3
    schedule = schedules.cubic(0.9, steps=20, start=5)
    ours = schedules.cadence(schedule, every=10, start=5, end=25)
    assert ours.events.tolist() == [5, 15, 25]
    assert ours.sparsity(25) == 0.9


@settings(deadline=None, max_examples=40)
@given(
    start=st.integers(0, 50),
    length=st.integers(0, 100),
    every=st.integers(1, 120),
    sparsity=fractions,
)
def test_the_last_event_reaches_the_target(start, length, every, sparsity):
    end = start + length
    schedule = schedules.cubic(
        sparsity, steps=max(length, 1), start=end - max(length, 1)
    )
    events = schedules.cadence(schedule, every=every, start=start, end=end)
    steps = np.arange(end + 10)
    # The staircase that a loop over the steps climbs.
    level, expected, found = 0.0, [], []
    for step in range(end + 10):
        if events.is_event(step):
            level = schedule(step)
            found.append(step)
        expected.append(level)
    np.testing.assert_array_equal(events.events, found)
    np.testing.assert_allclose(events.sparsity(steps), expected, atol=1e-12)
    assert expected[-1] == sparsity and found[-1] == end
    gaps = np.diff(events.events)
    assert np.all(gaps[:-1] == every) and np.all(gaps <= every)


def test_cadence_traced():
    schedule = schedules.cubic(0.9, steps=25)
    events = schedules.cadence(schedule, every=10, end=25)
    steps = np.arange(40)
    traced = jax.jit(jax.vmap(events.sparsity))(jnp.asarray(steps))
    np.testing.assert_allclose(traced, events.sparsity(steps), rtol=1e-6)
    hits = jax.jit(jax.vmap(events.is_event))(jnp.asarray(steps))
    np.testing.assert_array_equal(hits, events.is_event(steps))
    assert traced[-1] == jnp.float32(0.9)


@pytest.mark.parametrize("make", [schedules.one_shot, *ALL])
@pytest.mark.parametrize("sparsity", [1.0, 1.5, math.nan])
def test_sparsity_out_of_range(make, sparsity):
    extra = {} if make is schedules.one_shot else {"steps": 9}
    with pytest.raises(ValueError, match=r"sparsity: .* is outside \[0, 1\)"):
        make(sparsity, **extra)


@pytest.mark.parametrize("ramp", RAMPS)
def test_other_mistakes(ramp):
    with pytest.raises(ValueError, match="steps: 0 is below 1"):
        ramp(0.9, steps=0)
    with pytest.raises(ValueError, match=r"initial: -0.1 is outside \[0, 1\)"):
        ramp(0.9, steps=5, initial=-0.1)


def test_gap_halving_mistakes():
    with pytest.raises(ValueError, match=r"first: 0.5 is above the final sparsity 0.3"):
        schedules.gap_halving(0.3)
    with pytest.raises(ValueError, match="steps: 0"):
        schedules.gap_halving(0.9, steps=0)


def test_cadence_mistakes():
    schedule = schedules.cubic(0.9, steps=20)
    with pytest.raises(ValueError, match="every: 0 is below 1"):
        schedules.cadence(schedule, every=0, end=20)
    with pytest.raises(ValueError, match="end: 20 is before the start 21"):
        schedules.cadence(schedule, every=1, start=21, end=20)
    with pytest.raises(ValueError, match=r"schedule: it rises from 0.78.* to 0.9 "):
        schedules.cadence(schedule, every=1, end=10)
