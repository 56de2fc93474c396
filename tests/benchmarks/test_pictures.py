import importlib
import sys
from pathlib import Path

import pytest
from diffusers import VQModel
from torchvision.io import read_image

from nsvq.autoregressive.model import ModelConfig, make_llama
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.errors import UserError
from nsvq.pipelines import autoregressive, export

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
pictures = importlib.import_module("pictures")
sys.path.remove(str(ROOT / "benchmarks"))
NAMES = {0: "ant", 1: "bee", 2: "cat"}


@pytest.mark.parametrize("generator", ["dit", "ar"])
def test_the_samples_of_a_quickstart_of_either_generator_are_drawn(run_script, tmp_path, tokenizer_folder, generator):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    vae = VQModel.from_pretrained(tokenizer_folder)
    if generator == "ar":
        llama = make_llama(ModelConfig(size="tiny", depth=1, width=16, heads=2), 32, len(NAMES), 16)
        autoregressive.save_pipeline(tmp_path / "pipeline", llama, vae, NAMES)
    else:
        network = DiT(4, 3, len(NAMES), depth=1, width=16, heads=2)
        export.save_pipeline(tmp_path / "pipeline", export.to_stock(network), vae, flow_scheduler(1.5), NAMES)
    run_script(pictures.main, "--quickstart", tmp_path, "--out", tmp_path / "pictures")
    side = 16 + 2  # a picture, and the lines around it
    assert read_image(tmp_path / "pictures" / "samples.png").shape == (3, 2 * side + 2, len(NAMES) * side + 2)


def test_a_quickstart_that_is_not_there_is_told_before_anything_is_drawn(run_script, tmp_path):
    with pytest.raises(UserError, match="run `make quickstart` first"):
        run_script(pictures.main, "--quickstart", tmp_path / "none", "--out", tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
