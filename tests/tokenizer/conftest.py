import pytest
import torch
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
