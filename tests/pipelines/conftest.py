import pytest
import torch
from diffusers import VQModel

from nsvq.diffusion.dit import DiT
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "golden retriever"}
ABOUT = {
    "nsvq": "0.1.0",
    "versions": {"torch": "2.6.0", "diffusers": "0.33.0"},
    "step": 400,
    "samples_seen": 102400,
    "parameters": 1234567,
    "objective": "rectified flow, shifted by s = 1.5",
    "config": {
        "data": {"source": "someone/pets"},
        "optim": {
            "lr": 1e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.0,
            "clip_grad_norm": 1.0,
            "warmup_steps": 50,
            "ema_decay": 0.999,
        },
        "model": {"variant": "dit", "class_dropout": 0.1},
        "run": {"batch_size": 256, "mixed_precision": "bf16"},
    },
    "latents": {
        "key": {"image_size": 16, "flips": 2, "crops": 1, "latents": "continuous", "tokenizer": "abc123"},
        "shape": [2, 3, 4, 4],
        "count": 5000,
        "bad_images": 7,
        "mean": [0.1, -0.2, 0.0],
        "std": [0.9, 1.1, 1.0],
        "overall_std": 1.01,
    },
}


def _random_dit(**options):
    """A DiT whose weights are all random: at initialisation its output is zero."""
    model = DiT(**{"sample_size": 4, "in_channels": 3, "num_classes": 5, "depth": 2, "width": 64, "heads": 2} | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def about():
    """What training says of a run."""
    return ABOUT


@pytest.fixture(scope="session")
def dit():
    torch.manual_seed(2)
    return _random_dit()


@pytest.fixture(scope="session")
def random_dit():
    """random_dit(**options) -> another one."""
    return _random_dit


@pytest.fixture(scope="session")
def vae():
    torch.manual_seed(3)
    model = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=16,
        sample_size=16,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    ).eval()
    model.quantize.embedding.weight.data.normal_()
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory, dit, vae):
    """A pipeline as a run leaves it."""
    path = tmp_path_factory.mktemp("run") / "pipeline"
    save_pipeline(path, to_stock(dit), vae, flow_scheduler(1.5), NAMES, ABOUT)
    return path


@pytest.fixture
def pipeline(folder):
    loaded = ClassConditionalPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded
