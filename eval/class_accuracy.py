"""Whether samples are of the class asked for, in the eyes of a classifier trained on the data (eval/classifier.py)."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from common.data import DataConfig
from common.errors import UserError
from common.image_metrics import to_uint8
from eval.classifier import Classifier, train_classifier
from eval.ranks import gather_by_index
from eval.reference import real_batches

MEANINGS = {
    "class_accuracy": "share of samples that a network trained on the data puts into the class asked for",
    "class_accuracy_real": "the same of real test images",
}


def train_on_one_rank(data: DataConfig, workers: int, accelerator: Accelerator) -> Classifier:
    """The same classifier on all ranks. Raises `UserError` where the data has no classes. A collective call."""
    box = [None]
    accelerator.print(f"training a classifier on {data.source} ...", file=sys.stderr)
    if accelerator.is_main_process:
        try:
            box = [train_classifier(data, workers=workers, device=accelerator.device).cpu()]
        except UserError as error:
            box = [error]
    trained = broadcast_object_list(box)[0]
    if isinstance(trained, UserError):
        raise trained
    return trained.to(accelerator.device)


class ClassAccuracy:
    """Of one setting's samples, gathered image by image on each rank, and brought together at the end."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.rows: dict[str, list[Tensor]] = {"index": [], "label": [], "right": []}

    @torch.no_grad()
    def add(self, images: Tensor, index: Tensor, labels: Tensor) -> None:
        """Samples uint8 [B, 3, H, W] with their numbers [B] and the classes [B] that were asked for."""
        right = self.classifier(images).argmax(1).cpu() == labels
        for name, values in {"index": index, "label": labels, "right": right}.items():
            self.rows[name].append(values)

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
    for batch in real_batches(data, "test", limit, accelerator, **loading):
        images, labels = to_uint8(batch["image"].to(accelerator.device)), batch["label"].to(accelerator.device)
        if len(images):
            right = (classifier(images).argmax(1) == labels) & (labels >= 0)
            counts += torch.stack([right.sum(), (labels >= 0).sum()])
    right, labelled = accelerator.reduce(counts, "sum").tolist()
    return right / labelled if labelled else None
