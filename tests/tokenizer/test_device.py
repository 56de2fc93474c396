"""On a pretended GPU (tests/harness/pretend.py): every quantizer, and what is done to a codebook outside of a step."""

import pytest
import torch
from pretend import DEVICE, Pretend
from torch import nn

from nsvq.tokenizer import codebook_tiles
from nsvq.tokenizer.adaptive_weight import AdaptiveWeight
from nsvq.tokenizer.alignment import Alignment, AlignmentConfig
from nsvq.tokenizer.health import DriftProbe, near_duplicates, usage
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.logit_loss import LogitLoss, LogitsConfig
from nsvq.tokenizer.perturbation import Perturbation, TrainingPerturbationConfig
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.replacement import replace_dead_codes

LOOKS = {"vp"}  # its neighbours are found on the CPU


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_step_of_a_quantizer_waits_for_nothing(make, name):
    """Forward, backward, `end_step` with revival, and an epoch's end; also after a checkpoint came back."""
    quantizer = make(name)
    other = make(name)
    if name == "vp":
        quantizer.fitted.fill_(False)
    quantizer.revive_after, quantizer.nonstationary_weight = 0.1, 0.1
    with Pretend() as device:
        quantizer.to(DEVICE)
        for step in range(4):
            z = torch.randn(2, quantizer.dim, 3, 3, device=DEVICE, requires_grad=True)
            with device.counting() as waits:
                out = quantizer(z, 1.0 if quantizer.learns_codes else None)
                weights = dict.fromkeys(quantizer.terms, 1.0) | quantizer.loss_weights()
                (out.z_q.square().mean() + sum(w * out.losses[term] for term, w in weights.items())).backward()
                quantizer.squared_errors(z.detach(), out.z_q)
                quantizer.end_step(True)
            assert all(value.is_cuda for value in (out.z_q, z.grad, *out.losses.values(), *out.stats.values()))
            if step % 2 and name not in LOOKS:  # the steps before ask once how often was drawn, or how many epochs
                assert waits == [], "\n".join(waits)
            if step == 1:
                quantizer.load_state_dict(quantizer.state_dict())
        quantizer.end_epoch()
        if quantizer.final_latents():
            quantizer.fit(torch.randn(2 * quantizer.codebook_size, quantizer.dim, device=DEVICE))
        if count := quantizer.initial_latents():
            quantizer.initialize(torch.randn(count, quantizer.dim, device=DEVICE))
        quantizer.eval()(z)
        assert quantizer.codes(quantizer.lookup(torch.randn(5, quantizer.dim, device=DEVICE))).is_cuda
        table = quantizer.export_table()
        assert table is None or table.is_cuda
        other.load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize("form", ["cosine", "vf"])
def test_losses_of_frozen_networks_and_perturbation_wait_for_nothing(make, network_file, form):
    quantizer = make("vq")
    config = AlignmentConfig(form=form, network=network_file, layer="stem", width=8)
    parts = [Alignment(config, quantizer.dim), LogitLoss(LogitsConfig(network=network_file)), quantizer]
    encoder = nn.Conv2d(3, quantizer.dim, 8, 8)
    with Pretend() as device:
        alignment, logits, quantizer = (part.to(DEVICE) for part in parts)
        adaptive = AdaptiveWeight(encoder.to(DEVICE).weight, cap=1e8)
        perturbation = Perturbation(TrainingPerturbationConfig(delta=5, beta=1), quantizer, 0)
        images = torch.rand(2, 3, 32, 32, device=DEVICE)
        with device.counting() as waits:
            z = encoder(images)
            output = nn.functional.interpolate(perturbation.at([8, 9])(quantizer(z))[:, :3], (32, 32))
            loss, aligned = logits(output, images), alignment(z, images)
            if form == "vf":
                adaptive.observe(loss, aligned)
                aligned = adaptive.factor * aligned
            (loss + aligned).backward()
            adaptive.end_step(stepped=True)
        assert waits == [], "\n".join(waits)
        assert all(p.grad is not None and p.grad.is_cuda for p in (*encoder.parameters(), *alignment.head.parameters()))


def test_replacement_k_means_usage_and_the_probe_stay_on_the_device(make):
    quantizer = make("vq")
    with Pretend():
        quantizer.to(DEVICE)
        table, counts = quantizer.table(), torch.arange(40, device=DEVICE) % 3
        optimizer = torch.optim.Adam([table], fused=True)
        table.grad = torch.ones(40, 6, device=DEVICE)
        optimizer.step()
        averages = [table.detach().clone()]
        followers = {"averages": averages, "optimizer": optimizer, "noise": 0.1, "seed": 1}
        for weights in (None, torch.rand(40, device=DEVICE)):
            dead = replace_dead_codes(table, counts, weights=weights, **followers)
            assert torch.equal(dead.cpu(), torch.arange(0, 40, 3))
        assert usage(counts)["dead_codes"] == 14
        near_duplicates(quantizer.codebook())
        points = [torch.randn(60, 6, device=DEVICE) for _ in range(2)]
        points[0][:] = 0  # clusters without points
        for start in (None, table.detach()):
            assert kmeans(lambda: points, 40, seed=0, start=start, iterations=3).is_cuda
        probe, encoder = DriftProbe(torch.randn(2, 3, 4, 4, device=DEVICE)), nn.Conv2d(3, 6, 2).to(DEVICE)
        probe.measure(encoder, quantizer, 1.0)
        probe.load_state_dict({name: value.cpu() for name, value in probe.state_dict().items()})
        assert probe.measure(encoder, quantizer, 1.0)["churn"] == 0


def test_a_tokenizer_encodes_and_decodes_on_the_device(tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    fingerprint = tokenizer.fingerprint()
    with Pretend():
        tokenizer.to(DEVICE)
        indices = tokenizer.encode(torch.rand(2, 3, 16, 16, device=DEVICE))
        assert tokenizer.decode(indices).is_cuda
        z = tokenizer.latents(torch.rand(2, 3, 16, 16, device=DEVICE))
        assert tokenizer.quantization_error(z, tokenizer.quantize(z)).is_cuda
        assert tokenizer.fingerprint() == fingerprint


def test_the_plain_passes_run_on_a_device_too():
    """Where Triton is not, or latents are too wide for it."""
    with Pretend():
        z, codebook = torch.randn(70, 5, device=DEVICE), torch.randn(90, 5, device=DEVICE)
        assert codebook_tiles.nearest_code(codebook, codebook, True).is_cuda
        indices = codebook_tiles.nearest_code(z, codebook, False)
        for winners in (None, indices):
            for own in (False, True):
                assert all(value.is_cuda for value in codebook_tiles.softmax_sums(z, codebook, winners, 0.5, own))
