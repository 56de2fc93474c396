import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel
from PIL import Image

from nsvq.eval.config import GenerationConfig
from nsvq.eval.features import load_extractor
from nsvq.eval.generation import evaluate
from nsvq.eval.given_images import given_images

sys.path.insert(0, str(Path(__file__).parent))  # for fakes.py and two_ranks.py, which processes of their own share


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tiny(tiny_extractor, accelerator):
    """The extractor itself."""
    return load_extractor(tiny_extractor, None, accelerator)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A stock VQModel with 24 codes, some of them out of reach, for images of 16 pixels and f = 2."""
    torch.manual_seed(1)
    model = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=24,
        sample_size=16,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    model.quantize.embedding.weight.data.normal_()
    model.quantize.embedding.weight.data[:4] += 50
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Class folders with splits: 23 test images of 16 pixels in 3 classes, and one that does not decode."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 23)):
        for i in range(count):
            folder = root / split / ("ant", "bee", "cat")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    (root / "val" / "bee" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture
def measure_samples(image_folder, tiny_extractor, tmp_path):
    """Evaluate a pipeline, a stand-in for one, or given `images`, against the tiny images; returns the result."""
    from fakes import FakePipeline

    def run(pipeline=None, data=None, folder="pipeline", **options):
        source = {} if "images" in options else {"pipeline": str(tmp_path / folder)}
        config = GenerationConfig(
            **{
                **source,
                "data": {"source": str(image_folder), "max_bad_fraction": 0.3, **(data or {})},
                "output": tmp_path / "result.json",
                "features": [tiny_extractor],
                "cache": None,
                "samples": 40,
                "workers": 0,
                **options,
            }
        )
        if config.images:
            pipeline = given_images(config.images)
        return evaluate(pipeline or FakePipeline(), config, Accelerator(cpu=True))

    return run
