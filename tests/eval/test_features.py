import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from torch.utils.data import Dataset

from common.errors import UsageError, UserError
from eval import features
from eval.features import Extractor, Unavailable, distances, load_extractor, metric_name, rank_warnings


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def random_images(n, seed, contrast=1.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, 4, 4), generator=generator) * contrast
    return (255 * torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")).to(torch.uint8)


def in_batches(extractor, images, batch_size=103):
    batches = [extractor(batch) for batch in images.split(batch_size)]
    return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tiny(tiny_extractor, accelerator):
    return load_extractor(tiny_extractor, None, accelerator)


def test_all_metrics_equal_torch_fidelity_on_the_same_images(tiny):
    real, made = random_images(1200, 0), random_images(1030, 1, contrast=0.8)
    ours, skipped, warnings = distances(tiny, in_batches(tiny, made), in_batches(tiny, real))
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(made),
        input2=Images(real),
        feature_extractor="tiny",
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        cuda=False,
        save_cpu_ram=True,
        batch_size=103,
        verbose=False,
    )
    assert ours == pytest.approx(
        {
            "fd_tiny": theirs["frechet_inception_distance"],
            "is_tiny": theirs["inception_score_mean"],
            "is_std_tiny": theirs["inception_score_std"],
            "precision_tiny": theirs["precision"],
            "recall_tiny": theirs["recall"],
            "kd_tiny": theirs["kernel_inception_distance_mean"],
            "kd_std_tiny": theirs["kernel_inception_distance_std"],
        },
        rel=1e-6,
    )
    assert 0.05 < ours["recall_tiny"] < 0.95  # the comparison would say little at the ends
    assert ours["fd_tiny"] > 1e-3
    assert not skipped
    assert not warnings


def test_a_set_against_itself_gives_zero(tiny):
    images = tiny(random_images(300, 0))
    metrics, _, _ = distances(tiny, images, images)
    assert metrics["fd_tiny"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision_tiny"] == metrics["recall_tiny"] == 1


def test_only_inception_gives_the_plain_names():
    assert metric_name("fid", "inception-v3-compat") == "fid"
    assert metric_name("rfid", "mobilenet-v2") == "rfd_mobilenet-v2"
    assert metric_name("fid", "mobilenet-v2") == "fd_mobilenet-v2"
    assert metric_name("precision", "dinov2-vit-l-14") == "precision_dinov2-vit-l-14"


def test_too_few_images_are_said_and_not_measured(tiny):
    few, rows = tiny(random_images(3, 0)), tiny(random_images(40, 1))
    metrics, skipped, warnings = distances(tiny, few, rows)
    assert set(metrics) == {"fd_tiny"}
    assert set(skipped) == {"is_tiny", "precision_tiny", "recall_tiny", "kd_tiny"}
    assert "at least 4 images on each side, there are 3 and 40" in skipped["recall_tiny"]
    assert len(warnings) == 1  # three images in six dimensions; forty are enough
    assert "rank at most 2 in 6 dimensions" in warnings[0]
    assert not rank_warnings("fid", torch.zeros(7, 6), torch.zeros(7, 6))
    assert len(rank_warnings("fid", torch.zeros(6, 6), torch.zeros(7, 6))) == 1


def test_features_that_are_not_finite_are_an_error(tiny):
    broken = {layer: rows.clone() for layer, rows in tiny(random_images(20, 0)).items()}
    broken["6"][3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        distances(tiny, broken, tiny(random_images(20, 1)))


def test_an_extractor_without_class_outputs_gets_no_inception_score(tiny):
    embedding = Extractor("tiny", {metric: "6" for metric in ("fid", "prc", "kid")}, tiny.module)
    rows = tiny(random_images(20, 0))
    _, skipped, _ = distances(embedding, rows, rows)
    assert "no outputs" in skipped["is_tiny"]
    # torch-fidelity names DINOv2's embedding as the layer of the Inception Score, too.
    assert "isc" not in features._default_layers(features.FEATURE_EXTRACTORS_REGISTRY["dinov2-vit-s-14"])
    assert features._default_layers(features.FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"]) == {
        "fid": "2048",
        "kid": "2048",
        "prc": "2048",
        "isc": "logits_unbiased",
    }


def test_a_wrong_extractor_is_one_clear_usage_error(tmp_path):
    with pytest.raises(UsageError, match="did you mean inception-v3-compat"):
        features.resolve("inception-v3")
    with pytest.raises(UsageError, match=r"gone\.py: the file does not load"):
        features.resolve(str(tmp_path / "gone.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(UsageError, match="it registered none"):
        features.resolve(str(empty))


def test_weights_by_path_are_never_ignored(tiny_extractor, accelerator, tmp_path):
    wrong = tmp_path / "wrong.pth"
    torch.save({"a": torch.zeros(1)}, wrong)
    with pytest.raises(UsageError, match="tiny takes no weights by path"):
        load_extractor(tiny_extractor, wrong, accelerator)
    with pytest.raises(UserError, match="no file"):
        load_extractor("inception-v3-compat", tmp_path / "gone.pth", accelerator)
    with pytest.raises(UserError, match="does not hold the weights of vgg16"):
        load_extractor("vgg16", wrong, accelerator)
    wrong.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="does not hold the weights of vgg16"):
        load_extractor("vgg16", wrong, accelerator)


def test_a_failed_download_says_how_to_get_the_weights(monkeypatch, accelerator, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(Unavailable, match=r"no route to host.*weights-inception.*--features_weights"):
        load_extractor("inception-v3-compat", None, accelerator)


def test_the_shared_code_of_a_file_runs_once(tiny_extractor):
    assert features.resolve(tiny_extractor) == features.resolve(tiny_extractor) == "tiny"
