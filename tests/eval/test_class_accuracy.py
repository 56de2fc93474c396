import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UserError
from nsvq.eval import class_accuracy
from nsvq.eval.class_accuracy import train_classifier

CONFIG = DataConfig(source="synthetic", image_size=48)


@pytest.fixture(scope="module")
def trained():
    state = torch.random.get_rng_state()
    model = train_classifier(CONFIG, steps=90, batch_size=48)
    assert torch.equal(state, torch.random.get_rng_state()), "training must leave the global random state alone"
    batches = list(eval_batches(CONFIG, "test", batch_size=100, limit=500))
    return model, torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).double().mean().item()


def test_it_tells_the_synthetic_classes_apart_after_a_short_training(trained):
    assert accuracy(*trained) >= 0.97  # the full 250 steps reach more than 99 %


def test_soft_and_noisy_images_are_judged_fairly(trained):
    model, images, labels = trained
    soft = F.interpolate(F.avg_pool2d(images, 3), images.shape[2:], mode="bilinear")
    assert accuracy(model, soft, labels) >= 0.94
    assert accuracy(model, images + 0.15 * torch.randn_like(images), labels) >= 0.94


def test_bytes_are_judged_like_floats(trained):
    model, images, labels = trained
    assert accuracy(model, ((images + 1) * 127.5).round().to(torch.uint8), labels) == accuracy(*trained)


def test_data_without_classes_is_refused(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a.png")
    config = DataConfig(source=str(tmp_path))
    assert open_split(config, "train").classes == []
    with pytest.raises(UserError, match="no class labels"):
        train_classifier(config, steps=1)


def test_the_same_few_images_of_each_class_are_chosen_without_a_search_for_each():
    labels = np.random.default_rng(1).integers(-1, 7, 400)
    shuffled = np.random.default_rng(0).permutation(400)
    expected = [shuffled[labels[shuffled] == c][:50] for c in range(8)]  # of the last class there is none
    assert class_accuracy._some_of_each(labels, 8).tolist() == np.concatenate(expected).tolist()
    many = np.random.default_rng(1).integers(0, 1000, 400_000)
    start = time.process_time()
    assert len(class_accuracy._some_of_each(many, 1000)) == 50_000
    assert time.process_time() - start < 1  # 1,000 searches take four times as long
