"""What diffusers' options mean is the same for all kinds of folder: stock, with code, without classes, of tokens."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    LDMPipeline,
)

from nsvq.autoregressive.model import ModelConfig, make_llama
from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.diffusion.unet import make_unet
from nsvq.pipelines import autoregressive
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline

KINDS = ["dit", "modern", "unet", "ldm", "tokens"]
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane"}


def random_weights(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_dit, vae):
    """{kind: a folder as a run leaves it}."""
    torch.manual_seed(6)
    root = tmp_path_factory.mktemp("kinds")
    networks = {
        "dit": random_dit(num_classes=3),
        "modern": random_dit(num_classes=3, variant="modern"),
        "unet": random_weights(make_unet((3, 4, 4), 3, 32, (1,), 1)),
        "ldm": random_weights(make_unet((3, 4, 4), 0, 32, (1,), 1)),
    }
    for kind, network in networks.items():
        scheduler = flow_scheduler(1.5) if "dit" in kind else DDIMScheduler(clip_sample=False)
        save_pipeline(root / kind, to_stock(network), vae, scheduler, {} if kind == "ldm" else NAMES)
    llama = random_weights(make_llama(ModelConfig(size="tiny", depth=2, width=32, heads=2), 16, 3, 16).eval())
    autoregressive.save_pipeline(root / "tokens", llama, vae, NAMES)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def load(folders):
    def load(kind, **options):
        loaded = ClassConditionalPipeline.from_pretrained(folders.get(kind, kind), **options)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return load


def images(pipeline, labels=(1, 2), **options):
    """float32 [N, 3, H, W]; the pipeline of no class ignores labels."""
    labels = labels if pipeline.id2label else [None] * len(labels)
    steps = {} if isinstance(pipeline, TokenPipeline) else {"num_inference_steps": 2}
    return pipeline(labels, **{"seeds": [3, 4], "output_type": "pt"} | steps | options).images.float()


def dtypes(pipeline):
    return [pipeline.transformer.dtype, pipeline.vae.dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_passed_are_taken(load, kind, vae):
    other = type(vae)(**{k: v for k, v in vae.config.items() if not k.startswith("_")}).eval()
    transformer = load(kind).transformer
    loaded = load(kind, vae=other, transformer=transformer)
    assert loaded.vae is other
    assert loaded.transformer is transformer
    if kind == "tokens":
        with pytest.raises(ValueError, match="an autoregressive pipeline has no scheduler"):
            load(kind, scheduler=DDIMScheduler())
        return
    scheduler = DDIMScheduler(num_train_timesteps=500)
    assert load(kind, scheduler=scheduler).scheduler is scheduler


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_loading_passes_nothing_on_that_diffusers_is_about_to_forget(load, kind):
    load(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_for_each_part_is_taken_and_the_parts_of_two_types_sample(load, kind):
    loaded = load(kind, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert dtypes(loaded) == [torch.bfloat16, torch.float32]
    made = images(loaded)
    assert made.isfinite().all()
    assert made.shape == (2, 3, 16, 16)
    assert dtypes(load(kind, torch_dtype=torch.float16)) == [torch.float16] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_saved_whole_and_a_variant_lies_beside_the_weights_that_were_there(load, kind, tmp_path):
    target = tmp_path / "pipeline"
    whole = load(kind)
    whole.save_pretrained(target)
    load(kind, torch_dtype=torch.bfloat16).save_pretrained(target, variant="bf16")
    stored = {name: dtypes(load(target, **how)) for name, how in {"": {}, "bf16": {"variant": "bf16"}}.items()}
    assert stored == {"": [torch.float32] * 2, "bf16": [torch.float32] * 2}  # diffusers' default type is float32
    both = sorted(path.name for path in target.rglob("*.safetensors"))
    assert len(both) == 4
    assert sum(".bf16." in name for name in both) == 2
    from safetensors import safe_open

    for path in target.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds == ({"BF16"} if ".bf16." in path.name else {"F32"})
    assert load(target, variant="bf16").id2label == whole.id2label
    assert torch.equal(images(load(target)), images(whole))
    with pytest.raises(ValueError, match="variant=fp16"):
        load(target, variant="fp16")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_seeds_come_as_range_tensor_or_array(load, kind):
    loaded = load(kind)
    expected = images(loaded, [1, 2], seeds=[0, 1])
    for labels, seeds in [
        (range(1, 3), range(2)),
        (torch.tensor([1, 2]), torch.tensor([0, 1])),
        (np.array([1, 2]), np.array([0, 1])),
        ((torch.tensor(1), np.int64(2)), (np.uint8(0), torch.tensor(1))),
    ]:
        assert torch.equal(images(loaded, labels, seeds=seeds), expected)
    one = loaded(1 if loaded.id2label else None, seeds=np.int64(0), output_type="pt").images
    assert one.shape == (1, 3, 16, 16)
    for options, message in [
        ({"seeds": [0.5, 1]}, "seeds must be whole numbers, not 0.5"),
        ({"seeds": [[0, 1]]}, "list"),
    ]:
        with pytest.raises(ValueError, match=message):
            images(loaded, **options)
    with pytest.raises(ValueError, match="one list, not a list of lists"):
        loaded(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_from_the_parts_of_another_shares_them_and_knows_their_names(load, kind, folders):
    first = load(kind, torch_dtype=torch.bfloat16)
    again = type(first).from_pipe(first)
    assert again.transformer is first.transformer
    assert again.id2label == first.id2label
    assert dtypes(again) == [torch.bfloat16] * 2
    assert torch.equal(images(again), images(first))
    assert dtypes(type(first).from_pipe(first, torch_dtype=torch.float32)) == [torch.float32] * 2
    if kind in ("dit", "unet", "ldm"):  # they need no code
        stock = DiffusionPipeline.from_pretrained(folders[kind])
        assert type(stock) is (LDMPipeline if kind == "ldm" else DiTPipeline)
        from_stock = ClassConditionalPipeline.from_pipe(stock, scheduler=EulerDiscreteScheduler())
        assert type(from_stock.scheduler) is EulerDiscreteScheduler
        names = [{word.strip() for word in name.split(",")} for name in from_stock.id2label.values()]
        assert names == ([] if kind == "ldm" else [{"tench", "Tinca tinca"}, {"goldfish"}, {"crane"}])


@pytest.mark.parametrize("kind", KINDS)
def test_offloading_moves_each_part_when_it_is_used_and_changes_no_image(load, kind):
    """On the CPU in place of a GPU: the hooks are those that move the weights."""
    loaded = load(kind)
    expected, moved = images(loaded), []
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        loaded.enable_model_cpu_offload()
    assert type(loaded).model_cpu_offload_seq == "transformer->vae"
    loaded.enable_model_cpu_offload(device="cpu")
    for name in ("transformer", "vae"):
        hook = getattr(loaded, name)._hf_hook
        real = hook.pre_forward
        hook.pre_forward = lambda module, *a, real=real, name=name, **k: (moved.append(name), real(module, *a, **k))[1]
    loaded.vae.quantize.embedding.register_forward_pre_hook(lambda *_: moved.append("table"))
    assert torch.equal(images(loaded), expected)
    assert moved[0] == "transformer"
    assert "vae" in moved
    if kind == "tokens":  # it reads its table before `decode` is called
        assert moved.index("vae") < moved.index("table")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_map_places_the_parts_and_changes_no_image(load, kind):
    loaded = load(kind, device_map="cpu")
    assert loaded.hf_device_map == "cpu"
    torch.testing.assert_close(images(loaded), images(load(kind)), rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="nowhere not supported"):
        load(kind, device_map="nowhere")


@pytest.mark.parametrize("kind", ["modern", "ldm", "tokens"])
def test_a_repository_of_the_hub_loads_without_running_its_code(folders, kind, tmp_path, load):
    """As a cache holds it that an earlier download filled."""
    repository = tmp_path / "hub" / "models--someone--pipeline"
    shutil.copytree(folders[kind], repository / "snapshots" / "abc")
    for shipped in repository.rglob("*.py"):
        shipped.write_text("raise AssertionError('it ran')")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    where = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    loaded = ClassConditionalPipeline.from_pretrained("someone/pipeline", **where)
    assert torch.equal(images(loaded), images(load(kind)))


def test_a_vae_without_a_codebook_decodes_too(folders, load, tmp_path):
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    kl = AutoencoderKL(block_out_channels=(8, 8, 8), latent_channels=3, norm_num_groups=4, scaling_factor=0.5, **blocks)
    loaded = load("dit", vae=kl.eval())
    loaded.save_pretrained(tmp_path / "pipeline")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(stock.vae) is AutoencoderKL
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = stock([1, 2], guidance_scale=1.0, generator=generator, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(images(loaded), expected, rtol=0, atol=1e-5)
    assert type(load(tmp_path / "pipeline").vae) is AutoencoderKL
