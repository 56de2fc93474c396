import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel

from nsvq.errors import UserError
from nsvq.tokenizer import export
from nsvq.tokenizer.export import latent_statistics, save, to_vqmodel
from nsvq.tokenizer.model import ModelConfig, QuantizedDecoder, make_encoder
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.quantizers.vq import VQ, VQConfig
from nsvq.tokenizer.vqmodel import QuantizerVQModel


def config(dim):
    return ModelConfig(
        channels=8,
        channel_multipliers=[1, 2],
        layers_per_block=1,
        latent_channels=dim,
        norm_groups=4,
        mid_attention=True,
    )


def build(quantizer):
    """An encoder, and a decoder whose codes lie among its latents, far from the origin where the method allows it."""
    dim = quantizer.dim
    encoder = make_encoder(config(dim)).eval()
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoder.conv_out.bias += torch.linspace(-1, 1, dim) * (1 if quantizer.export_table() is None else 4)
        latents = encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
        latents = latents[torch.randperm(len(latents))]
        quantizer.initialize(latents[: quantizer.initial_latents()])
        if quantizer.final_latents():
            quantizer.fit(latents)
    return encoder, QuantizedDecoder(config(dim), quantizer).eval(), images


@pytest.fixture(params=sorted(QUANTIZERS))
def trained(request, make):
    return build(make(request.param))


@pytest.fixture
def plain():
    return build(VQ(VQConfig(codebook_size=40), 6))


def exported(encoder, decoder, images):
    mean, std = latent_statistics(encoder, images.split(4), Accelerator())
    quantizer = decoder.quantizer
    return to_vqmodel(config(quantizer.dim), 16, encoder, decoder, mean, std)


def test_a_rank_without_images_takes_part_in_the_statistics(monkeypatch):
    encoder, images = torch.nn.Conv2d(3, 2, 1), torch.randn(8, 3, 4, 4)
    expected = latent_statistics(encoder, images.split(4), Accelerator())
    alone = []
    monkeypatch.setattr(export, "gather_object", lambda parts: alone.extend(parts) or parts)
    latent_statistics(encoder, images.split(4), Accelerator())
    monkeypatch.setattr(export, "gather_object", lambda parts: [*alone, *parts])
    mean, std = latent_statistics(encoder, [], Accelerator())
    assert torch.equal(mean, expected[0])
    assert std == expected[1]


@torch.no_grad()
def test_exported_model_gives_the_trained_codes_and_images(trained, tmp_path):
    encoder, decoder, images = trained
    z = encoder(images)
    output, quantized = decoder(z)
    save(exported(encoder, decoder, images), tmp_path / "tokenizer", {"step": 1})

    stock = decoder.quantizer.export_table() is not None
    model = (VQModel if stock else QuantizerVQModel).from_pretrained(tmp_path / "tokenizer")
    torch.testing.assert_close(model(images).sample, output, atol=1e-4, rtol=1e-4)

    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    codes = tokenizer.encode(images)
    assert tokenizer.codebook_size == decoder.quantizer.codebook_size == len(tokenizer.codebook)
    assert torch.equal(codes, quantized.indices)
    torch.testing.assert_close(tokenizer.decode(codes), output, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scaled_latents_have_mean_zero_and_deviation_one_and_decode_back(trained):
    encoder, decoder, images = trained
    stock = exported(encoder, decoder, images)
    tokenizer = Tokenizer(stock)
    latents = tokenizer.latents(images)
    dim = decoder.quantizer.dim
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert not latents[:, dim:].any()  # ibq's extra channel
    assert float(latents[:, :dim].var((0, 2, 3), unbiased=False).mean()) == pytest.approx(1, abs=1e-4)
    decoded = stock.decode(latents / stock.config.scaling_factor).sample  # as diffusers' pipelines do
    torch.testing.assert_close(decoded, decoder(encoder(images))[0], atol=1e-4, rtol=1e-4)


def test_statistics_equal_those_of_all_latents_at_once(plain):
    encoder, _, images = plain
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
        Tokenizer(
            VQModel(
                block_out_channels=(32, 32),
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2,
            )
        ).encode(torch.zeros(1, 3, 9, 8))


def test_fingerprint_tells_weights_apart(trained):
    encoder, decoder, images = trained
    stock = exported(encoder, decoder, images)
    before = Tokenizer(stock).fingerprint()
    assert Tokenizer(exported(encoder, decoder, images)).fingerprint() == before
    with torch.no_grad():
        next(stock.decoder.parameters()).flatten()[3] += 1e-6
    assert Tokenizer(stock).fingerprint() != before


def test_an_absent_or_foreign_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at") as caught:
        Tokenizer.from_pretrained(tmp_path / "absent")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="holds a UNet2DModel"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_pipeline_with_the_projects_class_loads_in_stock_diffusers(make, tmp_path):
    from diffusers import DiffusionPipeline, DiTPipeline

    from nsvq.diffusion.dit import DiT
    from nsvq.diffusion.samplers import flow_scheduler
    from nsvq.eval.samples import load_pipeline
    from nsvq.pipelines.export import save_pipeline, to_stock
    from nsvq.pipelines.pipeline import ClassConditionalPipeline

    encoder, decoder, images = build(make("fsq"))
    model = exported(encoder, decoder, images)
    dit = DiT(sample_size=8, in_channels=4, num_classes=2, depth=1, width=16, heads=2)
    save_pipeline(tmp_path / "pipeline", to_stock(dit), model, flow_scheduler(1.0), {0: "a", 1: "b"})
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(stock) is DiTPipeline
    assert type(stock.vae) is QuantizerVQModel
    latents = Tokenizer(model).latents(images) / model.config.scaling_factor
    torch.testing.assert_close(stock.vae.decode(latents).sample, model(images).sample)
    stock.set_progress_bar_config(disable=True)
    assert stock([1], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    modern = DiT(sample_size=8, in_channels=4, num_classes=2, depth=1, width=16, heads=2, variant="modern")
    save_pipeline(tmp_path / "modern", to_stock(modern), model, flow_scheduler(1.0), {0: "a", 1: "b"})
    for folder in (tmp_path / "pipeline", tmp_path / "modern"):
        own = load_pipeline(str(folder))
        assert (type(own), type(own.vae)) == (ClassConditionalPipeline, QuantizerVQModel)
        torch.testing.assert_close(own.vae.decode(latents).sample, model(images).sample)
