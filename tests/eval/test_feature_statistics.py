import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from PIL import Image, ImageFilter
from scipy import linalg
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from nsvq.eval.feature_statistics import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    isc_splits,
    kid,
    precision_recall,
)
from nsvq.eval.features import INCEPTION, Collector, PytorchFidInception, load_extractor


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def random_images(n, seed, contrast=1.0, size=16):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, 4, 4), generator=generator) * contrast
    return (255 * F.interpolate(coarse, (size, size), mode="bilinear")).to(torch.uint8)


def collect(extractor, images, accelerator, batch_size=103):
    splits = isc_splits(len(images))
    collector = Collector(extractor, ("fid", "sfid", "kid", "prc", "isc"), splits=splits)
    for index in torch.arange(len(images)).split(batch_size):
        collector.add(images[index], index)
    return collector.total(accelerator)


@pytest.mark.slow
def test_all_metrics_equal_torch_fidelity_on_the_same_images(tiny, accelerator):
    real, made = random_images(1200, 0), random_images(1030, 1, contrast=0.8)
    real_set = collect(tiny, real, accelerator)
    made_set = collect(tiny, made, accelerator, batch_size=64)
    shared = {
        "input1": Images(made),
        "input2": Images(real),
        "feature_extractor": "tiny",
        "fid": True,
        "cuda": False,
        "save_cpu_ram": True,
        "batch_size": 103,
        "verbose": False,
    }
    theirs = torch_fidelity.calculate_metrics(**shared, isc=True, kid=True, prc=True)
    spatial = torch_fidelity.calculate_metrics(**shared, feature_layer_fid="spatial")
    ours = {"fid": frechet_distance(made_set.gaussians["6"], real_set.gaussians["6"])}
    ours |= {"sfid": frechet_distance(made_set.gaussians["spatial"], real_set.gaussians["spatial"])}
    mean, deviation = made_set.inception_score
    ours |= {"is": mean, "is_std": deviation, **kid(made_set.rows["6"], real_set.rows["6"])}
    ours |= precision_recall(made_set.rows["6"], real_set.rows["6"])
    assert ours == pytest.approx(
        {
            "fid": theirs["frechet_inception_distance"],
            "sfid": spatial["frechet_inception_distance"],
            "is": theirs["inception_score_mean"],
            "is_std": theirs["inception_score_std"],
            "precision": theirs["precision"],
            "recall": theirs["recall"],
            "kid": theirs["kernel_inception_distance_mean"],
            "kid_std": theirs["kernel_inception_distance_std"],
        },
        rel=1e-6,
    )
    assert 0.05 < ours["recall"] < 0.95  # the comparison would say little at the ends
    assert ours["fid"] > 1e-3


def gaussian_of(rows, accelerator):
    moments = Moments()
    for part in torch.as_tensor(rows).float().split(37):
        moments.add(part)
    return moments.total(accelerator)[1]


def test_a_set_against_itself_gives_zero_also_where_the_covariance_has_not_full_rank(accelerator):
    rng = np.random.default_rng(0)
    for n, d in ((400, 20), (30, 200)):
        rows = rng.normal(size=(n, d)) @ np.diag(np.geomspace(10, 1e-3, d)) + 3
        mine = gaussian_of(rows, accelerator)
        assert abs(frechet_distance(mine, mine)) < 1e-9
        other = gaussian_of(rows + rng.normal(size=d), accelerator)  # only the mean moves
        assert frechet_distance(mine, other) == pytest.approx((mine.mean - other.mean).square().sum().item(), rel=1e-9)


def test_the_distance_is_that_of_the_matrix_square_root(accelerator):
    rng = np.random.default_rng(1)
    a, b = (gaussian_of(rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)), accelerator) for _ in range(2))
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    theirs = [{"mu": x.mean.numpy(), "sigma": x.covariance.numpy()} for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(
        fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"], rel=1e-6
    )


def test_adms_inception_score_is_of_blocks_of_5000_consecutive_images(accelerator):
    logits = torch.randn(12_000, 5, generator=torch.Generator().manual_seed(0)) * 2
    score = InceptionScore(isc_splits(12_000, adm=True))
    for index in torch.arange(12_000).split(999):
        score.add(logits[index], index)
    blocks = [
        isc_features_to_metric(rows, splits=1, shuffle=False)["inception_score_mean"] for rows in logits.split(5000)
    ]
    assert score.total(accelerator) == pytest.approx((np.mean(blocks), np.std(blocks)), rel=1e-9)


@pytest.fixture(scope="module")
def inception(tmp_path_factory, accelerator):
    """torch-fidelity's Inception with random weights, read by path."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **o: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        module = FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    for name, values in module.state_dict().items():
        if name.endswith("bn.bias"):
            values.normal_(0.3, 0.3)  # so that features differ
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(module.state_dict(), path)
    return load_extractor(INCEPTION, path, accelerator)


@pytest.mark.slow
def test_sfid_is_adms_distance_of_the_first_7_channels_of_mixed_6_conv(inception):
    images = random_images(2, 2, size=24)
    features = inception._features(images)
    module = inception.module
    x = (
        torch_fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), (299, 299), align_corners=False
        )
        - 128
    ) / 128
    for name in (
        "Conv2d_1a_3x3",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3",
        "MaxPool_1",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
        "MaxPool_2",
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
    ):
        x = getattr(module, name)(x)
    # TensorFlow counts its mixed blocks from 5b on: mixed_6 is 6d, and its "conv" the branch of one 1 x 1 convolution.
    block = module.Mixed_6d.branch1x1
    batch_norm = (
        F.batch_norm(
            block.conv(x), block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias, eps=0.001
        )
        .relu()
        .numpy()
    )
    expected = batch_norm.transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)  # (B, 17, 17, 7), as TensorFlow orders it
    assert expected.shape == (2, 2023)
    np.testing.assert_allclose(features[inception.layers["sfid"]].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    assert any(
        "are not torch-fidelity's" in warning for warning in inception.warnings
    )  # random weights are no Inception


def test_simvqs_inception_sees_floats_resized_by_torch(inception):
    simvq = PytorchFidInception(inception)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    module, x = inception.module, F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    for name in (
        "Conv2d_1a_3x3",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3",
        "MaxPool_1",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
        "MaxPool_2",
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
        "Mixed_6d",
        "Mixed_6e",
        "Mixed_7a",
        "Mixed_7b",
        "Mixed_7c",
    ):
        x = getattr(module, name)(x)
    torch.testing.assert_close(simvq._features(images)["2048"], x.mean((2, 3)), rtol=1e-4, atol=1e-5)


def jpeg(image, quality):
    import io

    data = io.BytesIO()
    image.save(data, "jpeg", quality=quality)
    return Image.open(data).convert("RGB")


@pytest.mark.slow
def test_degradations_order_as_they_should(tiny, accelerator):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in random_images(300, 3, size=32)]

    def distance(degrade):
        images = torch.stack([torch.tensor(np.array(degrade(p))).permute(2, 0, 1) for p in pictures])
        return frechet_distance(collect(tiny, images, accelerator).gaussians["6"], real)

    real = collect(tiny, random_images(300, 3, size=32), accelerator).gaussians["6"]
    assert abs(distance(lambda p: p)) < 1e-4
    blurred = [distance(lambda p, r=r: p.filter(ImageFilter.GaussianBlur(r))) for r in (1, 2, 4)]
    smaller = [distance(lambda p, s=s: p.resize((s, s), Image.Resampling.BOX).resize((32, 32))) for s in (8, 4, 2)]
    compressed = [distance(lambda p, q=q: jpeg(p, q)) for q in (90, 20, 2)]
    for values in (blurred, smaller, compressed):
        assert 0 < values[0] < values[1] < values[2]


def test_gaussians_are_float64_sums_not_float32(accelerator):
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 100
    mine = gaussian_of(rows, accelerator)
    assert isinstance(mine, Gaussian)
    np.testing.assert_allclose(mine.covariance.numpy(), np.cov(rows.double().numpy(), rowvar=False), rtol=1e-4)
