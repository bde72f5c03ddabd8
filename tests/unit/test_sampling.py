"""Schedule, guidance, noise and Euler steps."""

import itertools
import math

import pytest
import torch

from zquant import sampling

# the schedules that the reference implementations print, to the digits they print
SCHEDULES = {
    "turbo": (8, 3.0, [1, 0.95454544, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]),
    "9 steps": (
        9,
        3.0,
        [1, 0.96, 0.913043, 0.857143, 0.789474, 0.705882, 0.6, 0.461538, 0.272727, 0],
    ),
    "4 steps": (4, 3.0, [1, 0.9, 0.75, 0.5, 0]),
    "no shift": (4, 1.0, [1, 0.75, 0.5, 0.25, 0]),
    "one step": (1, 3.0, [1, 0]),
}


@pytest.mark.parametrize(("steps", "shift", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(steps: int, shift: float, expected: list[float]) -> None:
    schedule = sampling.sigmas(steps, shift)
    assert schedule.dtype == torch.float32
    # six digits are right to half a digit, and float32 to 6e-8
    torch.testing.assert_close(schedule, torch.tensor(expected).float(), rtol=0, atol=6e-7)


def test_schedule_of_base() -> None:
    schedule = sampling.sigmas(50, 6.0)
    first = torch.tensor([1, 0.99661, 0.993103, 0.989474, 0.985714])
    last = torch.tensor([0.342857, 0.276923, 0.2, 0.109091, 0])
    torch.testing.assert_close(schedule[:5], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule[-5:], last, rtol=0, atol=1e-6)


def test_taus_are_what_the_network_is_told_at_each_step_and_not_after_the_last() -> None:
    expected = torch.tensor([0, 0.0454546, 0.1, 0.1666667, 0.25, 0.3571429, 0.5, 0.7])
    torch.testing.assert_close(sampling.taus(sampling.sigmas(8, 3.0)), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (8, 0.0), (8, -1.0)])
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=f"at least 1 and shift positive; got {steps} and {shift}"):
        sampling.sigmas(steps, shift)


def test_noise_is_the_cpu_generators_own() -> None:
    expected = torch.randn(1, 16, 4, 6, generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(sampling.initial_noise((1, 16, 4, 6), 7), expected)
    assert sampling.initial_noise((2,), 2**63 - 1).dtype == torch.float32


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sampling.initial_noise((8,), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_euler_is_exact_where_the_velocity_does_not_change() -> None:
    start, field = torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5)
    out = sampling.denoise(lambda *_: field, start, sampling.sigmas(7, 3.0))
    # sigma goes from 1 to 0, so all of the field is taken away; 7 roundings of 6e-8
    torch.testing.assert_close(out, start - field, rtol=0, atol=5e-7)
    assert torch.equal(start, torch.ones(1, 2, 4, 4))


def test_euler_on_a_linear_field_is_the_product_of_its_steps() -> None:
    schedule = sampling.sigmas(5, 3.0)
    out = sampling.denoise(lambda x, _: 2 * x, torch.ones(1, 1, 1, 1), schedule)
    expected = math.prod(1 + 2 * (b - a) for a, b in itertools.pairwise(schedule))
    assert out.item() == pytest.approx(float(expected), rel=1e-5)


def test_every_step_is_reported_with_its_result() -> None:
    seen = []
    out = sampling.denoise(
        lambda x, step: x * step,
        torch.ones(1, 1, 2, 2),
        sampling.sigmas(3, 3.0),
        lambda step, latents: seen.append((step, latents)),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], out)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 4, 5, generator=generator), torch.randn(
        2, 3, 4, 5, generator=generator
    )


def test_guidance_adds_the_difference() -> None:
    positive, negative = pair()
    expected = positive + 4 * (positive - negative)
    assert torch.equal(sampling.guide(positive, negative, 4.0, 0.0), expected)


def test_normalization_limits_each_sample_alone() -> None:
    positive, negative = pair()
    negative[1] = positive[1]  # the second sample is not guided, so it is within its limit
    guided = positive + 4 * (positive - negative)
    out = sampling.guide(positive, negative, 4.0, 0.5)
    assert out[0].norm().item() == pytest.approx(0.5 * positive[0].norm().item(), rel=1e-5)
    direction = torch.nn.functional.cosine_similarity(out[0].flatten(), guided[0].flatten(), 0)
    assert direction.item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(sampling.guide(positive, negative, 4.0, 1.0)[1], positive[1])


def test_normalization_never_makes_a_velocity_longer() -> None:
    positive, negative = pair()
    assert torch.equal(
        sampling.guide(positive, negative, 0.5, 100.0),
        sampling.guide(positive, negative, 0.5, 0.0),
    )


def test_guidance_of_nothing_is_nothing() -> None:
    zero = torch.zeros(1, 1, 2, 2)
    assert torch.equal(sampling.guide(zero, zero, 4.0, 1.0), zero)
