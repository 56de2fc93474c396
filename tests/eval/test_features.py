import pytest
import torch

from nsvq.errors import UsageError, UserError
from nsvq.eval import features
from nsvq.eval.features import Collector, Unavailable, load_extractor, metric_name


def test_only_inception_gives_the_plain_names():
    assert metric_name("fid", "inception-v3-compat") == "fid"
    assert metric_name("rfid", "mobilenet-v2") == "rfd_mobilenet-v2"
    assert metric_name("fid", "mobilenet-v2") == "fd_mobilenet-v2"
    assert metric_name("precision", "dinov2-vit-l-14") == "precision_dinov2-vit-l-14"


def test_features_that_are_not_finite_are_an_error(tiny, monkeypatch):
    monkeypatch.setattr(tiny.module, "forward", lambda x: (torch.full((len(x), 6), float("nan")),) * 3)
    collector = Collector(tiny, ("fid",))
    with pytest.raises(UserError, match="not finite"):
        collector.add(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20))


def test_every_metric_has_its_layer_and_a_class_score_needs_class_outputs(tiny):
    assert tiny.layers == {"fid": "6", "kid": "6", "prc": "6", "isc": "classes", "sfid": "spatial"}
    # torch-fidelity names DINOv2's embedding as the layer of the Inception Score, too.
    assert "isc" not in features._default_layers(features.FEATURE_EXTRACTORS_REGISTRY["dinov2-vit-s-14"])
    inception = features._default_layers(features.FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"])
    assert inception == {
        "fid": "2048",
        "kid": "2048",
        "prc": "2048",
        "isc": "logits_unbiased",
        "sfid": "mixed_6/conv:7",
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


@pytest.mark.slow
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


def test_an_extractor_is_named_by_the_weights_that_it_loaded(accelerator, tmp_path):
    (tmp_path / "net.py").write_text(
        """
import torch
from pathlib import Path
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class Net(FeatureExtractorBase):
    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.norm = torch.nn.BatchNorm2d(3)  # whose count of batches has no dimension
        self.norm.bias.data[:] = float(Path(__file__).with_name("weights.txt").read_text())

    @staticmethod
    def get_provided_features_list():
        return ("1",)


register_feature_extractor("weighed", Net)
"""
    )
    names = []
    for weights in ("1", "1", "2"):  # in a file of their own, beside the extractor's
        (tmp_path / "weights.txt").write_text(weights)
        names.append(load_extractor(str(tmp_path / "net.py"), None, accelerator).about)
    assert names[0] == names[1]
    assert names[0]["state_sha256"] != names[2]["state_sha256"]
    assert names[0]["file_sha256"] == names[2]["file_sha256"]
