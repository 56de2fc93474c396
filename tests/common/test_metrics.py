from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from nsvq.common import metrics
from nsvq.common.metrics import Means, MetricsLog, peak_flops


def test_means_weigh_by_samples_leave_out_what_was_not_there_and_survive_a_restart():
    accelerator = Accelerator(cpu=True)
    means = Means(accelerator)
    means.add("a", torch.tensor(6.0), 2)
    means.add("a", torch.tensor(3.0), 1)
    means.add("b", torch.tensor(0.0), torch.tensor(0.0))
    again = Means(accelerator)
    again.load_state_dict(means.state_dict())
    again.add("a", torch.tensor(11.0), 1)
    assert again.take() == {"a": 5.0}
    assert again.take() == {}
    assert means.take() == {"a": 3.0}


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),  # another GPU than the A10
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA H200", "no", None),
    ],
)
def test_the_peak_is_the_data_sheets_for_all_ranks_or_not_known(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision, num_processes=4)
    assert peak_flops(accelerator) == (expected and 4 * expected)


def test_utilization_is_the_counted_flops_times_speed_over_the_peak(monkeypatch, tmp_path):
    accelerator = Accelerator(cpu=True)
    log = MetricsLog(accelerator, tmp_path / "metrics.jsonl")
    layer = torch.nn.Linear(30, 20)
    with monkeypatch.context() as patch:
        patch.setattr(type(accelerator), "device", torch.device("cuda"))
        with log.counting_flops("step", images=5):
            layer(torch.ones(5, 30)).sum().backward()
    monkeypatch.setattr(metrics, "peak_flops", lambda accelerator: 1e9)
    values = log.write(1, 1000, {})
    # Forward and the gradient of the weights: two products, each of 2 x 30 x 20 operations an image.
    assert values["mfu"] == pytest.approx(2 * 2 * 30 * 20 * values["images_per_second"] / 1e9)
