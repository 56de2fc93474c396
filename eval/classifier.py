"""A small classifier, trained on the spot, that tells of which class a generated image is.

ImageNet classifiers know nothing of the synthetic set or of a user's own classes, and their weights can't be had on
every machine. This one is right on more than 99 % of the synthetic test split; on photographs read it only against its
score on real ones, which is measured beside that on generated ones.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsvq.common.image_metrics import from_uint8
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import train_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UserError


class Classifier(nn.Module):
    """images [B, 3, H, W] of any size, float in [-1, 1] or uint8 -> logits [B, classes].

    It looks at 32 x 32 pixels: shape and colour, no fine detail, so that a soft image is judged by what it shows."""

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            convolution = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)  # (B, 3, 32, 32) -> (B, 4 width, 2, 2)
        self.head = nn.Linear(4 * width * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        images = images if images.is_floating_point() else from_uint8(images)
        images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        return self.head(self.features(images).flatten(1))


def train_classifier(
    config: DataConfig, *, steps: int = 250, batch_size: int = 64, seed: int = 0, workers: int = 0, device="cpu"
) -> Classifier:
    """Train on `steps` batches of the training split, slightly blurred, noised and re-lit; returns it in eval mode.
    Leaves torch's global random state as it was. Raises `UserError` where the data has no classes."""
    classes = open_split(config, "train").classes
    if not classes:
        raise UserError(f"{config.source} has no class labels to train a classifier on (data.label_column names them)")
    bad = BadImages(config.max_bad_fraction)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(len(classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    batches = train_batches(config, batch_size=batch_size, seed=seed, workers=workers)
    for _, batch in zip(range(steps), batches, strict=False):
        bad.update(batch)
        bad.check()
        images = _degrade(batch["image"].to(device), generator)
        loss = F.cross_entropy(model(images), batch["label"].to(device), ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    batches.close()
    return model.eval()


def _degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a generated image may look like: softer (one radius a batch), noisier, otherwise lit."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=images.device)

    n, _, size, _ = images.shape
    sigma = float(uniform(1)) * size / 40
    if sigma > 0.2:
        reach = max(1, round(2.5 * sigma))
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
        weights = (weights / weights.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
        padded = F.pad(images, [reach] * 4, mode="replicate")
        images = F.conv2d(F.conv2d(padded, weights, groups=3), weights.transpose(2, 3), groups=3)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    images = images + noise * (0.1 * uniform(n, 1, 1, 1))
    return images * (0.7 + 0.5 * uniform(n, 1, 1, 1)) + 0.3 * (uniform(n, 3, 1, 1) - 0.5)
