import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel

from common.errors import UserError
from tokenizer import Tokenizer
from tokenizer.export import latent_statistics, save, to_vqmodel
from tokenizer.model import ModelConfig, QuantizedDecoder, make_encoder
from tokenizer.quantizers import QUANTIZERS

CONFIG = ModelConfig(
    channels=8, channel_multipliers=[1, 2], layers_per_block=1, latent_channels=6, norm_groups=4, mid_attention=True
)


@pytest.fixture(params=sorted(QUANTIZERS))
def trained(request):
    """An encoder, and a decoder whose codes lie among its latents, far from the origin."""
    encoder = make_encoder(CONFIG).eval()
    quantizer = QUANTIZERS[request.param](40, 6)
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoder.conv_out.bias += torch.linspace(-3, 4, 6)
        z = encoder(images)
        if quantizer.table() is not None:
            latents = z.permute(0, 2, 3, 1).flatten(0, 2)
            quantizer.initialize(latents[torch.randperm(len(latents))[:40]])
    return encoder, QuantizedDecoder(CONFIG, quantizer).eval(), images


def exported(encoder, decoder, images):
    mean, std = latent_statistics(encoder, images.split(4), Accelerator())
    return to_vqmodel(CONFIG, 16, encoder, decoder, mean, std)


@torch.no_grad()
def test_stock_model_gives_the_trained_codes_and_images(trained, tmp_path):
    encoder, decoder, images = trained
    output, quantized = decoder(encoder(images))
    save(exported(encoder, decoder, images), tmp_path / "tokenizer", {"step": 1})

    stock = VQModel.from_pretrained(tmp_path / "tokenizer")
    torch.testing.assert_close(stock(images).sample, output, atol=1e-4, rtol=1e-4)

    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    codes = tokenizer.encode(images)
    assert torch.equal(codes, quantized.indices)
    torch.testing.assert_close(tokenizer.decode(codes), output, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scaled_latents_have_mean_zero_and_deviation_one_and_decode_back(trained):
    encoder, decoder, images = trained
    stock = exported(encoder, decoder, images)
    tokenizer = Tokenizer(stock)
    latents = tokenizer.latents(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert float(latents.var((0, 2, 3), unbiased=False).mean()) == pytest.approx(1, abs=1e-4)
    decoded = stock.decode(latents / stock.config.scaling_factor).sample  # as diffusers' pipelines do
    torch.testing.assert_close(decoded, decoder(encoder(images))[0], atol=1e-4, rtol=1e-4)


def test_statistics_equal_those_of_all_latents_at_once(trained):
    encoder, _, images = trained
    with torch.no_grad():
        z = encoder(images).double()
    mean, std = latent_statistics(encoder, images.split(3), Accelerator())
    torch.testing.assert_close(mean.double(), z.mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    assert std == pytest.approx(float((z - z.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()), rel=1e-6)


def test_every_index_decodes_and_encodes_through_its_code():
    tokenizer = Tokenizer(VQModel(latent_channels=3, num_vq_embeddings=17, norm_num_groups=4, block_out_channels=(8,)))
    indices = torch.arange(17).view(1, 1, 17)
    z_q = tokenizer.codebook[indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(tokenizer.decode(indices), tokenizer.model.decode(z_q).sample)
    with pytest.raises(ValueError, match=r"0\.\.16"):
        tokenizer.decode(indices + 1)
    with pytest.raises(ValueError, match="multiples of"):
        Tokenizer(VQModel(block_out_channels=(32, 32), down_block_types=["DownEncoderBlock2D"] * 2,
                          up_block_types=["UpDecoderBlock2D"] * 2)).encode(torch.zeros(1, 3, 9, 8))  # fmt: skip


def test_fingerprint_tells_weights_apart(trained):
    encoder, decoder, images = trained
    stock = exported(encoder, decoder, images)
    before = Tokenizer(stock).fingerprint()
    assert Tokenizer(exported(encoder, decoder, images)).fingerprint() == before
    with torch.no_grad():
        stock.quantize.embedding.weight[3, 2] += 1e-6
    assert Tokenizer(stock).fingerprint() != before


def test_an_absent_or_foreign_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at") as caught:
        Tokenizer.from_pretrained(tmp_path / "absent")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="holds a UNet2DModel"):
        Tokenizer.from_pretrained(tmp_path)
