import re

import pytest

from tokenizer.health import alarms

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
