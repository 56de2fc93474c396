import shutil

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from huggingface_hub.errors import LocalEntryNotFoundError

from nsvq.errors import UserError
from nsvq.tokenizer import pretrained
from nsvq.tokenizer.pretrained import Tokenizer, find_tokenizer, open_tokenizer

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture
def out_of_reach(monkeypatch):
    monkeypatch.setattr(pretrained, "hub_answers", lambda: False)


def test_a_hub_id_is_read_from_the_cache_and_is_the_same_tokenizer(
    tokenizer_folder, tmp_path, monkeypatch, out_of_reach
):
    repository = tmp_path / "models--someone--tokenizer"
    shutil.copytree(tokenizer_folder, repository / "snapshots" / "abc")
    (repository / "snapshots" / "abc" / "nsvq.json").write_text('{"samples_seen": 7}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(pretrained, "snapshot_download", lambda id, **how: real(id, cache_dir=tmp_path, **how))
    tokenizer = Tokenizer.from_pretrained("someone/tokenizer")
    assert tokenizer.fingerprint() == Tokenizer.from_pretrained(tokenizer_folder).fingerprint()
    assert tokenizer.eval().trained == {"samples_seen": 7}
    assert find_tokenizer(tokenizer_folder) == tokenizer_folder


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("someone/tokenizer", LocalEntryNotFoundError("x"), "no copy of it is cached, and the Hub is out of reach"),
        ("runs/some/tokenizer", None, "there is no tokenizer at runs/some/tokenizer: train one"),
    ],
)
def test_a_tokenizer_that_is_nowhere_is_one_line(source, error, said, monkeypatch, out_of_reach):
    def download(*_, **options):
        assert options["local_files_only"]
        raise error

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    with pytest.raises(UserError) as caught:
        open_tokenizer(source)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_a_tokenizer_of_one_channel_is_told_so(kind, tmp_path):
    model = kind(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **BLOCKS)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a tokenizer of images with 1 channel in and 1 out: images here have 3"):
        open_tokenizer(tmp_path)


def test_latents_of_an_autoencoder_are_the_scaled_mode_and_what_needs_codes_refuses_it(tmp_path):
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
    model = AutoencoderKL(**BLOCKS, **shape, scaling_factor=0.3, shift_factor=0.1).eval()
    model.save_pretrained(tmp_path)
    tokenizer, images = open_tokenizer(tmp_path), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, _ = model.quant_conv(model.encoder(images)).chunk(2, dim=1)
    # Without the shift: the stock DiTPipeline divides by the factor, and adds nothing.
    torch.testing.assert_close(tokenizer.latents(images), 0.3 * mean)
    assert torch.equal(tokenizer.latents(images), tokenizer.latents(images))
    assert (tokenizer.downsampling, tokenizer.latent_channels, tokenizer.codebook_size) == (2, 3, 0)
    with pytest.raises(UserError, match="holds a AutoencoderKL, not a VQModel: it has no codes"):
        Tokenizer.from_pretrained(tmp_path)
