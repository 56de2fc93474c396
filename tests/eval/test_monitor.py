import torch

from nsvq.data.config import DataConfig
from nsvq.eval.feature_statistics import Moments, frechet_distance
from nsvq.eval.monitor import FrechetMonitor


def test_a_run_measures_in_exact_float32_whatever_it_trains_with(
    tiny_extractor, image_folder, accelerator, monkeypatch, tmp_path
):
    """Evaluations do, and read the references that a run leaves."""
    monkeypatch.setattr("nsvq.eval.monitor.DEFAULT_CACHE", tmp_path)
    seen = {"real": [], "made": [], "drawn": []}
    kind = "real"
    forward = torch.nn.Module.__call__

    def watched(module, *inputs, **options):
        seen[kind].append(torch.backends.cudnn.allow_tf32)
        return forward(module, *inputs, **options)

    def draw(numbers):
        seen["drawn"].append(torch.backends.cudnn.allow_tf32)
        return samples[list(numbers)]

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    data = DataConfig(source=str(image_folder), image_size=16, max_bad_fraction=0.5)
    monitor = FrechetMonitor(tiny_extractor, None, data, accelerator)
    kind, samples = "made", torch.rand(32, 3, 16, 16) * 2 - 1
    found = monitor.measure(draw, 20, 16)
    assert {name: set(values) for name, values in seen.items()} == {"real": {False}, "made": {False}, "drawn": {True}}
    assert torch.backends.cudnn.allow_tf32
    assert list(tmp_path.glob("*.npz"))
    moments = Moments()
    levels = ((samples[:20] + 1) * 127.5).round().to(torch.uint8)
    moments.add(monitor.extractor(levels)["6"])
    _, gaussian = moments.total(accelerator)
    assert found == {"fd_tiny": frechet_distance(gaussian, monitor.real.gaussians["6"])}
