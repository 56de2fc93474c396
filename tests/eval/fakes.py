"""A stand-in for `pipelines.ClassConditionalPipeline`: each image is a function of its class and its seed alone."""

from types import SimpleNamespace

import torch
from diffusers.configuration_utils import FrozenDict

from nsvq.diffusion.samplers import flow_scheduler

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])


class FakePipeline:
    device = torch.device("cpu")

    def __init__(self, names=("ant", "bee", "cat")):
        self.id2label = dict(enumerate(names))
        self.transformer = SimpleNamespace(config=SimpleNamespace(sample_size=8))
        self.vae = SimpleNamespace(config=FrozenDict(block_out_channels=(8, 8)))
        self.scheduler = flow_scheduler(1.0)
        self.calls = []

    def __call__(self, class_labels, *, seeds, output_type, **options):
        assert output_type == "latent"
        self.calls.append({"class_labels": class_labels, "seeds": seeds, **options})
        return SimpleNamespace(images=torch.stack([self.image(c, s) for c, s in zip(class_labels, seeds, strict=True)]))

    def decode(self, latents):
        return latents

    @staticmethod
    def image(label, seed):
        noise = torch.rand((3, 4, 4), generator=torch.Generator().manual_seed(seed)) - 0.5
        noise = torch.nn.functional.interpolate(noise[None], (16, 16), mode="bilinear")[0]
        return (COLOURS[label % 3].view(3, 1, 1) + 0.6 * noise).clamp(0, 1)  # (3, 16, 16)
