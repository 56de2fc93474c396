import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import VQModel
from PIL import Image


def make_tokenizer(seed):
    """A stock VQModel for images of 16 pixels: 4 x 4 x 3 latents."""
    torch.manual_seed(seed)
    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=32,
        sample_size=16,
        scaling_factor=2.0,
        mid_block_add_attention=False,
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other-tokenizer")
    make_tokenizer(1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Class folders without splits: 46 images of 18 x 16 pixels in 2 classes, of which one in 20 is held out."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(46):
        folder = root / ("ant", "bee")[i % 2]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((18, 16), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    return Accelerator(cpu=True)
