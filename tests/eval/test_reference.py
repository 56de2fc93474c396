import numpy as np
import pytest
import torch
from fakes import FakePipeline
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from nsvq.common.image_metrics import to_uint8
from nsvq.errors import UserError
from nsvq.eval import reference
from nsvq.files import file_hash


def test_the_reference_is_the_split_that_was_asked_for(measure_samples):
    result = measure_samples(reference="train")
    assert result["counts"]["real_images"] == 12
    assert result["data"]["split"] == "train"
    assert measure_samples(reference_limit=9)["counts"]["real_images"] in (8, 9)  # one of them may be the broken one


def write_reference(path, **changes):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6))
    arrays = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return arrays


def test_the_reference_can_be_adms_file_of_statistics(measure_samples, tmp_path):
    path = tmp_path / "reference.npz"
    arrays = write_reference(path)
    result = measure_samples(reference=str(path))
    tiny = FEATURE_EXTRACTORS_REGISTRY["tiny"]("tiny", ["6", "spatial"])
    images = torch.stack([to_uint8(FakePipeline.image(i % 3, i) * 2 - 1) for i in range(40)])
    for name, rows, mean, covariance in zip(
        ("fd_tiny", "sfd_tiny"), tiny(images), ("mu", "mu_s"), ("sigma", "sigma_s"), strict=True
    ):
        ours = fid_features_to_statistics(rows.double())
        theirs = {"mu": arrays[mean], "sigma": arrays[covariance]}
        expected = fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
        assert result["metrics"][name] == pytest.approx(expected, rel=1e-6)
    assert "holds no images" in result["skipped"]["precision_tiny"]
    assert result["reference"]["sha256"] == file_hash(path)


@pytest.mark.parametrize("metric", ["isc", "prc"])
def test_a_reference_file_of_images_serves_metrics_other_than_the_distance(measure_samples, tmp_path, metric):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    whole = measure_samples(reference=str(tmp_path / "images.npz"), metrics=["fid", metric])["metrics"]
    alone = measure_samples(reference=str(tmp_path / "images.npz"), metrics=[metric])["metrics"]
    assert alone
    assert alone == {name: value for name, value in whole.items() if name != "fd_tiny"}


def test_a_wrong_reference_file_is_one_clear_error(measure_samples, tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match=r"reference\.npz is no \.npz file"):
        measure_samples(reference=str(path))
    path.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"is no \.npz file in ADM's format"):
        measure_samples(reference=str(path))
    for changes, message in (
        ({"mu": None}, "must hold mu and sigma, or images in arr_0; it holds sigma, mu_s, sigma_s"),
        ({"sigma": np.eye(5)}, r"found mu \(6,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 features; those of tiny have 6"),
        ({"sigma": np.full((6, 6), np.nan)}, "no finite mean and symmetric covariance"),
        ({"arr_0": np.zeros((20, 8, 8, 3), np.uint8)}, "images of 8 x 8 pixels, not 16 x 16"),
        ({"arr_0": np.zeros((20, 16, 16, 3))}, r"arr_0 must hold images, uint8 \[N, H, W, 3\], not float64"),
    ):
        write_reference(path, **changes)
        with pytest.raises(UserError, match=message):
            measure_samples(reference=str(path))
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        measure_samples(reference="validation")


def test_no_real_image_is_read_for_metrics_of_the_samples_alone(measure_samples, monkeypatch, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    whole = measure_samples()["metrics"]
    monkeypatch.setattr(reference, "eval_batches", None)
    monkeypatch.setattr(reference, "Collector", type("Unread", (reference.Collector,), {"add": None}))
    for real in ("test", str(tmp_path / "images.npz")):
        result = measure_samples(metrics=["isc"], reference=real)
        assert result["metrics"] == {name: whole[name] for name in ("is_tiny", "is_std_tiny")}
        assert result["counts"] == {"samples": 40}


def test_the_second_run_reuses_the_reference_unless_something_changed(measure_samples, monkeypatch, tmp_path):
    read = []
    original = reference.eval_batches

    def counting(*arguments, **options):
        read.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(reference, "eval_batches", counting)
    kept = {"cache": tmp_path / "cache", "cache_features": True}
    first = measure_samples(**kept)
    again = measure_samples(**kept)
    assert len(read) == 1
    assert again["metrics"] == first["metrics"]
    assert again["counts"] == first["counts"]
    assert again["reference"]["kept_from_an_earlier_run"] == ["tiny"]
    measure_samples(**kept, reference_limit=9)
    measure_samples(**kept, reference="train")
    assert len(read) == 3
    statistics = {"cache": tmp_path / "cache", "reference_limit": 8}
    measure_samples(**statistics)
    measure_samples(**statistics)  # precision needs single features, which are not kept unless asked for
    assert len(read) == 5
    measure_samples(**statistics, metrics=["fid", "sfid", "isc"])
    assert len(read) == 5
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert measure_samples(**kept)["metrics"] == first["metrics"]  # a damaged file is made again
    assert len(read) == 6
