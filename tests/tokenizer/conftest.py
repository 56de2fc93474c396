import multiprocessing

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors.torch import save_file

from nsvq.tokenizer.quantizers import QuantizerConfig, make_quantizer

# The smallest sensible form of each method: its options, and d.
SMALL = {
    "fsq": ({"levels": [8, 5, 3, 2]}, 4),
    "fsp": ({"levels": [8, 5, 3, 2]}, 4),
    "lfq": ({"temperature": 0.5}, 6),
    "bsq": ({"temperature": 0.2}, 6),
    "ibq": ({"codebook_size": 40, "temperature": 0.5}, 6),
    "vp": ({"codebook_size": 40, "push": 0.5, "refresh": 2}, 3),
    "fvq": ({"codebook_size": 40, "group": 4, "width": 16}, 6),
    "transvq": ({"codebook_size": 40, "width": 16}, 6),
}

NETWORK = '''
import torch
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class Net(FeatureExtractorBase):
    """A convolution to 14 x 14 places, and four classes."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 5, 16, 16)
        self.classify = torch.nn.Linear(5, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5

    def forward(self, x):
        assert x.dtype == torch.uint8
        logits = self.classify(self.stem(x.float() / 255 * 4 - 2).tanh().mean((2, 3)))
        return tuple(logits for _ in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return ("logits",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "logits", "fid": "logits"}[metric]


register_feature_extractor("net", Net)
'''


@pytest.fixture(scope="session")
def network_file(tmp_path_factory):
    """A Python file that registers a tiny network: its `stem` gives features [B, 5, 14, 14], its output 4 logits."""
    path = tmp_path_factory.mktemp("network") / "net.py"
    path.write_text(NETWORK)
    return str(path)


@pytest.fixture
def make(tmp_path):
    """make(name, **options): a small quantizer of that method, started, with `options` of its config set as well."""

    def make(name, **options):
        small, d = SMALL.get(name, ({"codebook_size": 40}, 6))
        if name == "lc":
            save_file({"features": torch.randn(40, 9)}, tmp_path / "features.safetensors")
            small = {"features": tmp_path / "features.safetensors"}
        d = options.pop("dim", d)
        config = TypeAdapter(QuantizerConfig).validate_python({"name": name} | small | options)
        quantizer = make_quantizer(config, d)
        if name == "fvq":  # away from its start, where all codes are zero
            torch.nn.init.normal_(quantizer.recover.weight)
        if count := quantizer.initial_latents():
            quantizer.initialize(torch.randn(count, d))
        if quantizer.final_latents():
            quantizer.fit(torch.randn(2 * quantizer.codebook_size, d))
        return quantizer

    return make


@pytest.fixture
def as_two_ranks(tmp_path):
    """as_two_ranks(run): what run(rank) returns in each of two processes of one group."""

    def work(run, rank):
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        torch.save(run(rank), tmp_path / f"rank-{rank}.pt")
        dist.destroy_process_group()

    def both(run):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(run, rank), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]

    return both
