import re

import pytest
import torch
from accelerate import Accelerator

from nsvq.tokenizer.health import EpochUsage, alarms

HEALTHY = {"utilization": 0.9, "perplexity": 500.0, "discriminator": 0.9, "real_logits": 0.3, "fake_logits": -0.2}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"utilization": 0.125, "perplexity": 40.5}, "the codebook collapses: 12.5% of 1024 codes .* perplexity 40.5"),
        ({"discriminator": 0.01}, "the GAN diverges: discriminator loss 0.010 .* 0.30 on real and -0.20 on"),
        ({"fake_logits": -31.0}, "the GAN diverges: discriminator loss 0.900 .* -31.00 on reconstructed"),
    ],
)
def test_alarms_come_with_the_numbers(change, text):
    found = alarms(HEALTHY | change, 1024)
    assert len(found) == (text is not None)
    assert text is None or re.search(text, found[0])
    assert alarms({"l1": 0.2}, 1024) == []


def test_an_epochs_usage_sums_counts_and_errors_by_code_over_batches_and_a_restart():
    usage = EpochUsage(4, Accelerator(cpu=True))
    usage.update(torch.tensor([[[0, 2]], [[2, 2]]]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor(0.5), 2)
    again = EpochUsage(4, Accelerator(cpu=True))
    again.load_state_dict(usage.state_dict())
    again.update(torch.tensor([[[3, 0]]]), torch.tensor([[[0.5, 8.0]]]), torch.tensor(2.0), 1)
    again.update(None, torch.zeros(1, 1, 2), torch.tensor(1.0), 1)
    counts, errors, commitment = again.total()
    assert counts.tolist() == [2, 0, 3, 1]
    assert errors.tolist() == [9.0, 0.0, 9.0, 0.5]
    assert commitment == (0.5 * 2 + 2.0 + 1.0) / 4
