import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from scipy import stats

from fedgrade.errors import PlanRefused
from fedgrade.privacy.grid import MAX_SCALE
from fedgrade.privacy.noise import discrete_gaussian, floating_gaussian, poisson_sample

# Every statistical test here fails by chance less than once in ten million runs.
FALSE_ALARM = 1e-7
SIX_DEVIATIONS = 6.0


@pytest.mark.parametrize("scale", [1, 3])
def test_small_noise_has_exactly_the_promised_distribution(scale):
    draws = discrete_gaussian(20_000, scale=scale)
    support = np.arange(-40 * scale, 40 * scale + 1)
    mass = np.exp(-(support**2) / (2 * scale**2))
    mass /= mass.sum()
    usual = mass * len(draws) >= 10
    low, high = support[usual].min(), support[usual].max()
    seen = np.array([np.sum(draws == x) for x in range(low, high + 1)] + [np.sum((draws < low) | (draws > high))])
    promised = np.append(mass[usual], mass[~usual].sum()) * len(draws)
    assert stats.chisquare(seen, promised).pvalue > FALSE_ALARM


@pytest.mark.parametrize("scale", [2**10 * 7, 2**20 * 17, 2**42 + 1, 2**43 * 3, 2**45, MAX_SCALE])
def test_large_noise_has_the_promised_moments(scale):
    draws = discrete_gaussian(10_000, scale=scale) / scale
    size = len(draws)
    assert abs(draws.mean()) <= SIX_DEVIATIONS / np.sqrt(size)
    assert abs(draws.var() - 1) <= SIX_DEVIATIONS * np.sqrt(2 / size)
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM


def test_large_noise_uses_every_integer_and_is_uncorrelated():
    draws = discrete_gaussian(10_000, scale=2**30)
    odd = np.sum(draws % 2)
    assert abs(odd - 5_000) <= SIX_DEVIATIONS * 50
    assert len(np.unique(draws)) > 9_990
    scaled = draws / 2.0**30
    assert abs(np.mean(scaled[1:] * scaled[:-1])) <= SIX_DEVIATIONS / 100


def seed_everything():
    torch = pytest.importorskip("torch")
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the old global generator is exactly what must not matter
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: discrete_gaussian(50, scale=2**20),
        lambda: floating_gaussian(50, scale=1.0),
        lambda: poisson_sample(200, rate=0.5),
    ],
)
def test_no_seed_can_reproduce_the_noise(draw):
    seed_everything()
    first = draw()
    seed_everything()
    assert not np.array_equal(first, draw())


def test_pytorchs_generator_keeps_only_32_bits_of_its_seed_which_is_why_its_noise_is_not_used():
    torch = pytest.importorskip("torch")
    one, other = (torch.Generator().manual_seed(seed) for seed in (12345, 12345 + (7 << 32)))
    assert torch.equal(torch.randn(10, generator=one), torch.randn(10, generator=other))


def test_a_forked_process_does_not_repeat_its_parents_noise():
    program = """
        import os
        from fedgrade.privacy.noise import discrete_gaussian, floating_gaussian
        discrete_gaussian(5, scale=2**40)  # whatever is buffered is buffered now
        if os.fork() == 0:
            print(discrete_gaussian(5, scale=2**40).tolist(), floating_gaussian(3, scale=1.0).tolist(), flush=True)
            os._exit(0)
        os.wait()
        print(discrete_gaussian(5, scale=2**40).tolist(), floating_gaussian(3, scale=1.0).tolist())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    child, parent = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not set(child.strip("[]").replace("] [", ", ").split(", ")) & set(
        parent.strip("[]").replace("] [", ", ").split(", ")
    )


def test_the_size_is_the_one_asked_for():
    assert discrete_gaussian(0, scale=5).shape == floating_gaussian(0, scale=1.0).shape == (0,)
    assert discrete_gaussian(7, scale=5).shape == (7,)
    assert discrete_gaussian(7, scale=5).dtype == np.int64


@pytest.mark.parametrize("scale", [0, -1, MAX_SCALE + 1])
def test_noise_of_no_or_overflowing_scale_is_refused(scale):
    with pytest.raises(PlanRefused, match="noise scale"):
        discrete_gaussian(1, scale=scale)


def test_the_largest_noise_stays_far_from_the_edge_of_64_bits():
    draws = discrete_gaussian(1_000, scale=MAX_SCALE)
    assert np.abs(draws).max() < 2**56


def test_floating_noise_is_normal():
    draws = floating_gaussian(100_000, scale=2.5)
    assert np.isfinite(draws).all()
    assert stats.kstest(draws / 2.5, "norm").pvalue > FALSE_ALARM
    assert abs(np.mean(draws[1:] * draws[:-1])) / 6.25 <= SIX_DEVIATIONS / np.sqrt(len(draws))
    assert np.abs(draws).max() > 2.5 * 3.5


def test_floating_noise_is_finite_even_where_the_uniform_draw_is_extreme(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("secrets.token_bytes", lambda size, byte=byte: byte * size)
        assert np.isfinite(floating_gaussian(10, scale=1.0)).all()


@pytest.mark.parametrize("rate", [0.003, 0.05, 0.5, 1.0])
def test_every_item_joins_at_the_stated_rate_and_on_its_own(rate):
    joined = poisson_sample(100_000, rate=rate)
    deviation = np.sqrt(rate * (1 - rate) * len(joined))
    assert abs(joined.sum() - rate * len(joined)) <= SIX_DEVIATIONS * deviation
    pairs = np.sum(joined[1:] & joined[:-1])
    assert abs(pairs - rate**2 * len(joined)) <= SIX_DEVIATIONS * (rate * np.sqrt(3 * len(joined)) + 1)
