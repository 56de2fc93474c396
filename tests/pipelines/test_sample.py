import numpy as np
import pytest
import torch
from PIL import Image

from nsvq.errors import UsageError, UserError
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.pipelines.sample import main


def test_picture_has_a_row_a_class_with_one_seed_an_image(run_script, folder, pipeline, tmp_path):
    out = tmp_path / "new" / "grid.png"
    run_script(
        main,
        "--pipeline",
        folder,
        "--classes",
        4,
        "tench",
        "--output",
        out,
        "--per_class",
        3,
        "--steps",
        2,
        "--guidance_scale",
        1.5,
        "--seed",
        10,
        "--batch_size",
        4,
        "--device",
        "cpu",
    )
    grid = np.asarray(Image.open(out))
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    expected = pipeline([4] * 3 + [0] * 3, seeds=range(10, 16), num_inference_steps=2, guidance_scale=1.5).images
    for i, image in enumerate(expected):
        top, left = 2 + 18 * (i // 3), 2 + 18 * (i % 3)
        shown = grid[top : top + 16, left : left + 16].astype(int)
        assert np.abs(shown - np.asarray(image).astype(int)).max() <= 1


def test_a_number_that_is_the_name_of_a_class_is_that_class(run_script, folder, pipeline, tmp_path, capsys):
    pipeline.id2label = {0: "1", 1: "10", 2: "2", 3: "3", 4: "4"}
    pipeline.save_pretrained(tmp_path / "numbers")
    how = ["--pipeline", tmp_path / "numbers", "--output", tmp_path / "grid.png", "--per_class", 1, "--steps", 1]
    for number in (2, 1):
        run_script(main, *how, "--classes", number, "--device", "cpu")
    assert "2 is taken" not in (said := capsys.readouterr().err)
    assert "1 is taken for the name of class 0, not for the class of that id" in said


def test_sampler_and_guide_reach_the_pipeline(run_script, folder, pipeline, random_dit, vae, tmp_path):
    save_pipeline(tmp_path / "weak", to_stock(random_dit(depth=1)), vae, pipeline.scheduler, pipeline.id2label)
    out = tmp_path / "grid.png"
    run_script(
        main,
        "--pipeline",
        folder,
        "--classes",
        4,
        "--output",
        out,
        "--per_class",
        1,
        "--steps",
        3,
        "--sampler",
        "heun",
        "--guide",
        tmp_path / "weak",
        "--guidance_scale",
        2.0,
        "--device",
        "cpu",
    )
    shown = np.asarray(Image.open(out)).astype(int)
    how = {"seeds": [0], "num_inference_steps": 3, "guidance_scale": 2.0}
    guide = pipeline.load_guide(tmp_path / "weak")
    expected, others = (
        np.asarray(pipeline([4], **how, **more).images[0]).astype(int)
        for more in ({"sampler": "heun", "guide": guide}, {"sampler": "heun"})
    )
    assert np.abs(shown - expected).max() <= 1
    assert np.abs(shown - others).max() > 1


def test_a_dtype_is_that_of_the_network_and_leaves_the_tokenizer_its_codes(run_script, folder, pipeline, tmp_path):
    out, how = tmp_path / "grid.png", {"seeds": range(2), "num_inference_steps": 2, "output_type": "pt"}
    options = ["--classes", 4, "--per_class", 2, "--steps", 2, "--guidance_scale", 1, "--dtype", "bfloat16"]
    run_script(main, "--pipeline", folder, "--output", out, "--device", "cpu", *options)
    pipeline.transformer.to(torch.bfloat16)
    latents = pipeline([4, 4], **how | {"output_type": "latent"}).images
    expected = torch.cat([*pipeline.decode(latents)], dim=2)
    others = torch.cat([*pipeline.to(torch.bfloat16).decode(latents).float()], dim=2)
    shown = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)[:, 2:18]
    shown = torch.cat([shown[:, :, 2:18], shown[:, :, 20:36]], dim=2) / 255
    assert latents.dtype == torch.bfloat16
    assert (shown - expected).abs().max() < 1.5 / 255
    assert (shown - others).abs().max() > 3 / 255


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"--guide": "nowhere"}, UserError, "there is no pipeline at nowhere"),
        (
            {"--sampler": "ddim"},
            UsageError,
            "'ddim' is no sampler of rectified flow: take one of euler, heun, dpm++, sde",
        ),
        ({"--sampler": "dopri5"}, UsageError, "sampler = 'dopri5': it should be 'euler', 'heun'"),
        ({"--pipeline": "nowhere"}, UserError, "there is no pipeline at nowhere"),
        ({"--classes": "goldfisch"}, UsageError, "did you mean 'goldfish'"),
        ({"--classes": 7}, UsageError, "class 7 does not exist"),
        ({"--output": "grid.txt"}, UsageError, "must end in one of .png"),
        ({"--guidance_interval": [0.9, 0.1]}, UsageError, "guidance_interval"),
        ({"--step": 3}, UsageError, "did you mean steps"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(run_script, folder, tmp_path, change, error, message):
    options = {"--pipeline": folder, "--classes": 0, "--output": tmp_path / "grid.png", "--device": "cpu"} | change
    arguments = [
        part for key, value in options.items() for part in (key, *(value if isinstance(value, list) else [value]))
    ]
    with pytest.raises(UserError) as raised:
        run_script(main, *arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
