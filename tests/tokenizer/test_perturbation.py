import pytest
import torch

from nsvq.errors import UsageError
from nsvq.tokenizer.perturbation import Perturbation, TrainingPerturbationConfig, nearest_codes, perturb
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.quantizers.base import NearestQuantizer

TABLES = [name for name, method in QUANTIZERS.items() if issubclass(method, NearestQuantizer) or method.free_table]


def test_nearest_codes_are_those_of_a_sort_by_distance():
    codebook = torch.randn(50, 4) + 100
    codes = codebook[torch.randint(50, (30,))]
    distances = (codes[:, None].double() - codebook.double()).square().sum(2)
    assert torch.equal(nearest_codes(codes, codebook, 7), distances.argsort(1)[:, :7])


@pytest.mark.parametrize("name", TABLES)
def test_the_decoder_sees_near_codes_with_the_gradient_that_it_had(make, name):
    quantizer = make(name)
    perturbation = Perturbation(TrainingPerturbationConfig(alpha=1, beta=1, delta=3), quantizer, seed=0)
    z = torch.randn(2, quantizer.dim, 4, 4, requires_grad=True)
    quantized = quantizer(z)
    seen = perturbation.at([0, 1])(quantized)
    codebook = quantizer.codebook().detach()
    near = nearest_codes(codebook[quantized.indices.flatten()], codebook, 3)
    rows = seen.detach().permute(0, 2, 3, 1).flatten(0, 2)
    distances = (rows[:, None] - codebook[near]).norm(dim=2).min(1)
    assert distances.values.max() < 1e-5
    assert {0, 1, 2} == set(distances.indices.tolist())
    assert not torch.allclose(seen, quantized.z_q)
    direction = torch.randn_like(seen)
    gradients = [torch.autograd.grad((x * direction).sum(), z, retain_graph=True)[0] for x in (seen, quantized.z_q)]
    assert torch.equal(*gradients)


def test_shares_are_alpha_and_beta_and_each_seed_draws_its_own():
    codes = torch.randint(1000, (400, 8, 8))
    near = lambda found: found[:, None] + 1000 * torch.arange(1, 11)  # noqa: E731, ten others, all of them new
    seeds = [(3, i) for i in range(400)]
    changed = perturb(codes, near, seeds, 0.3, 0.6, 10)
    touched = (changed != codes).flatten(1)
    assert touched.any(1).float().mean() == pytest.approx(0.6, abs=0.06)
    assert touched[touched.any(1)].float().mean() == pytest.approx(0.3, abs=0.02)
    draws = ((changed - codes) // 1000)[changed != codes]
    assert torch.bincount(draws)[1:].float().div(len(draws)).sub(0.1).abs().max() < 0.02
    assert torch.equal(perturb(codes[100:], near, seeds[100:], 0.3, 0.6, 10), changed[100:])
    assert torch.equal(perturb(codes, near, seeds, 0.3, 1e-9, 10), codes)


def test_draws_depend_on_the_position_in_the_run_and_not_on_the_batch(make):
    quantizer = make("vq")
    perturbation = Perturbation(TrainingPerturbationConfig(alpha=0.7, beta=0.6, delta=5), quantizer, seed=4)
    quantized = quantizer(torch.randn(8, quantizer.dim, 4, 4))
    whole = perturbation.at(range(16, 24))(quantized)
    halves = [
        perturbation.at(range(16 + start, 20 + start))(
            quantized._replace(z_q=quantized.z_q[start : start + 4], indices=quantized.indices[start : start + 4])
        )
        for start in (0, 4)
    ]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(perturbation.at(range(24, 32))(quantized), whole)
    random = torch.get_rng_state()
    perturbation.at(range(16, 24))(quantized)
    assert torch.equal(torch.get_rng_state(), random)  # what networks draw is what it was without


def test_alpha_falls_in_a_line_to_zero_where_nothing_is_touched(make):
    config = TrainingPerturbationConfig(alpha=0.8, anneal_from=2, anneal_to=6, delta=5)
    assert [config.alpha_at(epoch) for epoch in (0, 2, 3, 5, 6, 9)] == pytest.approx([0.8, 0.8, 0.6, 0.2, 0, 0])
    at_once = TrainingPerturbationConfig(anneal_from=3, anneal_to=3)
    assert [at_once.alpha_at(epoch) for epoch in (2.9, 3)] == [1, 0]
    quantizer = make("vq")
    perturbation = Perturbation(config, quantizer, 0)
    perturbation.alpha = 0.0
    quantized = quantizer(torch.randn(2, quantizer.dim, 4, 4))
    assert perturbation.at([0, 1])(quantized) is quantized.z_q


def test_too_few_codes_are_refused(make):
    with pytest.raises(UsageError, match=r"perturbation\.delta = 100 must be at most the number of codes, 40"):
        Perturbation(TrainingPerturbationConfig(), make("vq"), 0)
    with pytest.raises(ValueError, match="must not be before"):
        TrainingPerturbationConfig(anneal_from=3, anneal_to=2)
