"""Both stages, both evaluations and the summary, as `make quickstart` chains them, at the smallest size."""

import json

import torch
import yaml
from diffusers import DiffusionPipeline, DiTPipeline

from nsvq.diffusion.train import main as train_diffusion
from nsvq.eval.generation import main as measure_samples
from nsvq.eval.reconstruction import main as measure_reconstruction
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.pipelines.summary import main as summarize
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.train import main as train_tokenizer

RUN = {"batch_size": 8, "workers": 0, "log_every": 4, "sample_every": 100, "checkpoint_every": 100, "trackers": []}
DATA = {"source": "synthetic", "image_size": 16}
TOKENIZER = {
    "data": DATA,
    "model": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_groups": 4,
    },
    "quantizer": {"codebook_size": 32},
    "loss": {"perceptual": "none"},
    "discriminator": {"channels": 8, "layers": 1},
    "nsvq": {"replace": {"after": 0}, "freeze": {"latest": 3, "warmup": 1, "ramp": 1}},
    "schedule": {"epoch_samples": 16, "epochs": 6},
    "validation": {"images": 8, "probe_images": 4, "statistics_images": 32},
    "run": RUN,
}
DIFFUSION = {
    "data": DATA,
    "steps": 8,
    "cache_images": 64,
    "model": {"size": "tiny", "depth": 2, "width": 32, "heads": 2},
    "optim": {"warmup_steps": 1},
    "sampling": {"images": 4, "steps": 2},
    "run": RUN | {"trackers": ["tensorboard"]},
}


def test_both_stages_end_in_a_measured_folder_that_stock_diffusers_loads(run_script, tmp_path, capsys):
    for name, config in (("tokenizer", TOKENIZER), ("dit", DIFFUSION)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    run_script(train_tokenizer, "--config", tmp_path / "tokenizer.yaml", "--out", out / "nsvq")
    run_script(
        train_diffusion, "--config", tmp_path / "dit.yaml", "--tokenizer", out / "nsvq/tokenizer", "--out", out / "dit"
    )
    (out / "tokenizer").symlink_to("nsvq/tokenizer")
    (out / "pipeline").symlink_to("dit/pipeline")
    assert list((out / "dit" / "logs").rglob("events.out.tfevents*"))

    shared = ["--data", "synthetic", "--features", "none", "--workers", 0]
    run_script(
        measure_reconstruction,
        "--tokenizer",
        out / "tokenizer",
        "--lpips",
        "none",
        "--limit",
        16,
        *shared,
        "--output",
        out / "reconstruction.json",
    )
    run_script(
        measure_samples,
        "--pipeline",
        out / "pipeline",
        "--samples",
        20,
        "--steps",
        2,
        *shared,
        "--reference_limit",
        16,
        "--output",
        out / "generation.json",
    )
    capsys.readouterr()
    run_script(summarize, "--out", out)
    table = capsys.readouterr().out
    measured = json.loads((out / "reconstruction.json").read_text())
    assert f"{measured['metrics']['psnr']:.2f} dB" in table
    assert str(out / "generation.png") in table
    assert str(out / "report.html") in table
    card = (out / "pipeline" / "README.md").read_text()
    assert f"| psnr | {measured['metrics']['psnr']:.5g}" in card
    assert "quantizer vq, NSVQ (NS loss 0.1" in " ".join(card.split())

    stock = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(stock) is DiTPipeline
    own = ClassConditionalPipeline.from_pretrained(out / "pipeline")
    stock.set_progress_bar_config(disable=True)
    own.set_progress_bar_config(disable=True)
    assert stock.get_label_ids(["star"]) == own.class_ids(["star"]) == [5]
    theirs = stock(
        [5, 8],
        guidance_scale=2.0,
        num_inference_steps=3,
        output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    ours = own(["star", "heart"], guidance_scale=2.0, num_inference_steps=3, output_type="np", seeds=[3, 4]).images
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-4, rtol=0)

    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert codes.shape == (2, 8, 8)
    assert tokenizer.decode(codes).shape == (2, 3, 16, 16)

    (out / "dit").rename(out / "ar")  # GENERATOR=autoregressive has another folder
    (out / "pipeline").unlink()
    (out / "pipeline").symlink_to("ar/pipeline")
    run_script(summarize, "--out", out, "--generator", "ar")
    assert str(out / "ar" / "metrics.jsonl") in capsys.readouterr().out
