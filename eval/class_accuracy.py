"""Whether samples are of the class asked for, in the eyes of a classifier: a small one trained on the data
(eval/classifier.py), or a feature extractor's own class outputs."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nsvq.common.image_metrics import to_uint8
from nsvq.data.config import DataConfig
from nsvq.errors import UsageError, UserError
from nsvq.eval.classifier import train_classifier
from nsvq.eval.distributed import gather_by_index
from nsvq.eval.features import Extractor
from nsvq.eval.reference import real_batches

_IMAGES_PER_CLASS = 50  # real ones, to find out which output of an extractor means which class

MEANINGS = {
    "class_accuracy": "share of samples that the classifier (--classifier) puts into the class asked for",
    "class_accuracy_real": "the same of real test images",
}

Classifier = Callable[[Tensor], Tensor]  # uint8 images [B, 3, H, W] -> a score for each class [B, C]


def train_on_one_rank(data: DataConfig, workers: int, accelerator: Accelerator) -> Classifier:
    """The same classifier on all ranks. Raises `UserError` where the data has no classes. A collective call."""
    trained: Any = None
    accelerator.print(f"training a classifier on {data.source} ...", file=sys.stderr)
    if accelerator.is_main_process:
        try:
            trained = train_classifier(data, workers=workers, device=accelerator.device).cpu()
        except UserError as error:
            trained = error
    trained = broadcast_object_list([trained])[0]
    if isinstance(trained, UserError):
        raise trained
    return trained.to(accelerator.device)


@torch.no_grad()
def from_outputs(
    extractor: Extractor, data: DataConfig, classes: int, accelerator: Accelerator, **loading: int
) -> Classifier:
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
    for batch in real_batches(data, "train", _IMAGES_PER_CLASS * classes, accelerator, "real images", **loading):
        images, labels = batch["image"].to(accelerator.device), batch["label"].to(accelerator.device)
        if len(images):
            scores = extractor(to_uint8(images))[layer].double().softmax(1)
            sums.index_add_(0, labels[labels >= 0], scores[labels >= 0])
    sums = accelerator.reduce(sums, "sum").cpu()
    if not sums.sum(1).all():
        raise UsageError(f"--classifier features: of some class {data.source} has no labelled training image")
    chosen = torch.from_numpy(linear_sum_assignment(sums / sums.sum(1, keepdim=True), maximize=True)[1])
    return lambda images: extractor(images)[layer][:, chosen.to(images.device)]


class ClassAccuracy:
    """Of one setting's samples, gathered image by image on each rank, and brought together at the end."""

    def __init__(self, classifier: Classifier):
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
    classifier: Classifier, data: DataConfig, limit: int | None, accelerator: Accelerator, **loading: int
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
