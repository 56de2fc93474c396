"""Whether samples are of the class asked for, in the eyes of a classifier: a small one trained on the spot, or the
class outputs of a feature extractor.

ImageNet classifiers know nothing of the synthetic set or of a user's own classes, and their weights can't be had on
every machine. The small one is right on more than 99 % of the synthetic test split; on photographs read it only against
its score on real ones, which is measured beside that on generated ones.
"""

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nsvq.common.image_metrics import from_uint8, to_uint8
from nsvq.common.run import on_main_process
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import batches_in_order, train_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError
from nsvq.eval.distributed import gather_by_index
from nsvq.eval.features import Extractor
from nsvq.eval.reference import real_batches

_IMAGES_PER_CLASS = 50  # real ones, to find out which output of an extractor means which class

MEANINGS = {
    "class_accuracy": "share of samples that the classifier (--classifier) puts into the class asked for",
    "class_accuracy_real": "the same of real test images",
}


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
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # the CPU's, which draws the weights
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


def train_on_one_rank(data: DataConfig, workers: int, accelerator: Accelerator) -> Classifier:
    """The same classifier on all ranks. Raises `UserError` where the data has no classes. A collective call."""
    accelerator.print(f"training a classifier on {data.source} ...", file=sys.stderr)
    how = {"workers": workers, "device": accelerator.device}
    trained = on_main_process(accelerator, lambda: train_classifier(data, **how).cpu())
    return trained.to(accelerator.device)


@torch.no_grad()
def from_outputs(
    extractor: Extractor, data: DataConfig, classes: int, accelerator: Accelerator, **loading: int
) -> Callable:
    """The extractor as a classifier of the data: each class is the output that real training images of it excite most,
    no output two classes. `loading`: batch_size and workers. Raises `UsageError` where the extractor has no class
    outputs, or too few. A collective call."""
    layer = extractor.layers.get("isc")
    if layer is None:
        lacks = f"{extractor.name} has none, or --metrics leaves out isc, which reads them"
        raise UsageError(f"--classifier features needs class outputs, and {lacks}: use --classifier trained")
    one_image = torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8, device=accelerator.device)
    outputs = extractor(one_image)[layer].shape[1]
    if outputs < classes:
        raise UsageError(f"--classifier features: {extractor.name} has {outputs} outputs for {classes} classes")
    sums = torch.zeros(classes, outputs, dtype=torch.float64, device=accelerator.device)
    split = open_split(data, "train")
    mine = _some_of_each(split.labels(), classes)[accelerator.process_index :: accelerator.num_processes]
    for batch in batches_in_order(split, mine, data.image_size, **loading):
        images = batch["image"].to(accelerator.device)
        if len(images):
            scores = extractor(to_uint8(images))[layer].double().softmax(1)
            sums.index_add_(0, batch["label"].to(accelerator.device), scores)
    sums = accelerator.reduce(sums, "sum").cpu()
    if not sums.sum(1).all():
        raise UsageError(f"--classifier features: of some class {data.source} has no labelled training image")
    chosen = torch.from_numpy(linear_sum_assignment(sums / sums.sum(1, keepdim=True), maximize=True)[1])
    return lambda images: extractor(images)[layer][:, chosen.to(images.device)]


def _some_of_each(labels: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of the same random images of each class, class by class; labels [N] (-1: none)."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    order = shuffled[labels[shuffled].argsort(kind="stable")]
    borders = np.searchsorted(labels[order], np.arange(classes + 1))
    return np.concatenate([order[start:end][:_IMAGES_PER_CLASS] for start, end in pairwise(borders)])


class ClassAccuracy:
    """Of one setting's samples, in the eyes of `classifier` (uint8 images [B, 3, H, W] -> scores [B, C]),
    gathered image by image on each rank, and brought together at the end."""

    def __init__(self, classifier: Callable):
        self.classifier = classifier
        self.rows: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(self, images: Tensor, index: Tensor, labels: Tensor) -> None:
        """Samples uint8 [B, 3, H, W] with their numbers [B] and the classes [B] that were asked for."""
        right = self.classifier(images).argmax(1).cpu() == labels
        self.rows.append({"index": index, "label": labels, "right": right})

    def total(self, names: list[str], accelerator: Accelerator) -> tuple[float, dict[str, float]] | None:
        """(accuracy, accuracy of each class by its name) over all ranks; None but on the main process. A collective
        call."""
        rows = gather_by_index(accelerator, self.rows)
        if rows is None:
            return None
        right, label = rows["right"].double(), rows["label"]
        by_class = {names[c]: right[label == c].mean().item() for c in label.unique().tolist()}
        return right.mean().item(), by_class


@torch.no_grad()
def real_accuracy(
    classifier: Callable, data: DataConfig, limit: int | None, accelerator: Accelerator, **loading: int
) -> float | None:
    """The classifier's accuracy on the labelled real test images, None where they have no labels. `loading`: batch_size
    and workers. A collective call."""
    counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    for batch in real_batches(data, "test", limit, accelerator, "real images", **loading):
        images, labels = to_uint8(batch["image"].to(accelerator.device)), batch["label"].to(accelerator.device)
        if len(images):
            right = (classifier(images).argmax(1) == labels) & (labels >= 0)
            counts += torch.stack([right.sum(), (labels >= 0).sum()])
    right, labelled = accelerator.reduce(counts, "sum").tolist()
    return right / labelled if labelled else None
