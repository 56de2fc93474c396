import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nsvq.common import config as configs
from nsvq.data.config import IMAGENET
from nsvq.errors import UsageError, UserError
from nsvq.eval import class_accuracy, generation
from nsvq.eval.config import GenerationConfig
from nsvq.eval.given_images import given_images
from nsvq.eval.page import write_page


@pytest.fixture
def drawn(measure_samples, tmp_path):
    """The result of a pipeline whose 40 samples were kept, as PNG files and in ADM's format."""
    return measure_samples(keep="npz", output=tmp_path / "drawn.json")


def pixels(count=20, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_the_samples_of_a_pipeline_measure_the_same_when_they_are_given(measure_samples, drawn, tmp_path):
    with np.load(drawn["samples"]["npz"]) as file:
        np.savez_compressed(tmp_path / "packed.npz", **file)
    picture = (tmp_path / "drawn.png").read_bytes()
    for images in (drawn["samples"]["npz"], str(tmp_path / "packed.npz"), drawn["samples"]["png"]):
        result = measure_samples(images=images, samples=None)
        assert result["metrics"] == drawn["metrics"]
        assert result["counts"] == drawn["counts"]
        assert result["images"]["folder"] == images
        assert len(result["images"]["sha256"]) == 64
        assert not {"pipeline", "sampler", "samples"} & set(result)
        assert (result["seeds"], result["setting"]) == ("drawn by another program", {})
        classes = [] if images.endswith("steps-50") else ["ant", "bee", "cat"]
        assert result["classes"] == classes
        assert result["grid"]["rows"] == (classes or ["no class"])
        assert ((tmp_path / "result.png").read_bytes() == picture) == bool(classes)
        write_page(tmp_path / "page.html", [json.loads(json.dumps(result, default=str))], [])
        page = (tmp_path / "page.html").read_text()
        assert f"<h2>Generation: {images}</h2>" in page
        assert "40 images, 16 x 16 pixels, test split of" in page


def test_given_images_are_judged_by_their_own_classes(measure_samples, monkeypatch, tmp_path):
    judge = SimpleNamespace(to=lambda device: lambda images: torch.eye(3)[images[:, 0, 0, 0].long() % 3])
    monkeypatch.setattr(class_accuracy, "train_classifier", lambda *args, **how: SimpleNamespace(cpu=lambda: judge))
    images, labels = pixels(), np.arange(20) % 2
    images[:, 0, 0, 0] = labels
    images[:5, 0, 0, 0] = 2
    np.savez(tmp_path / "own.npz", arr_0=images, arr_1=labels)
    how = {"images": str(tmp_path / "own.npz"), "samples": None, "features": ["none"], "classifier": "trained"}
    result = measure_samples(**how)
    assert result["metrics"]["class_accuracy"] == 15 / 20
    assert result["class_accuracy_by_class"] == {"ant": 7 / 10, "bee": 8 / 10}
    np.savez(tmp_path / "own.npz", arr_0=images, arr_1=labels + 2)
    with pytest.raises(UsageError, match=r"the 3 classes of .* are not the 4 of .*own\.npz"):
        measure_samples(**how)
    np.savez(tmp_path / "own.npz", arr_0=images)
    with pytest.raises(UsageError, match=r"need classes, and .*own\.npz has none"):
        measure_samples(**how)


def test_all_images_count_or_the_first_of_them_and_a_protocol_misses_the_rest(measure_samples, tmp_path):
    images = pixels(37)
    np.savez(tmp_path / "all.npz", arr_0=images)
    np.savez(tmp_path / "some.npz", arr_0=images[:21])
    every = measure_samples(images=str(tmp_path / "all.npz"), samples=None, protocol="nsvq")
    assert every["counts"]["samples"] == 37
    assert any("nsvq means 5000 samples, these are 37" in warning for warning in every["warnings"])
    first = measure_samples(images=str(tmp_path / "all.npz"), samples=21)
    assert first["metrics"] == measure_samples(images=str(tmp_path / "some.npz"), samples=None)["metrics"]
    with pytest.raises(UsageError, match=r"--samples 38, but .*all\.npz holds 37 images"):
        measure_samples(images=str(tmp_path / "all.npz"), samples=38)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --pipeline or --images, one of the two"),
        ({"pipeline": "p", "images": "i.npz"}, "give --pipeline or --images, one of the two"),
        ({"images": "i", "steps": [50], "guidance_scale": [2.0]}, "leave out --guidance_scale, --steps$"),
        *(({"images": "i", name: value}, f"leave out --{name}$") for name, value in (("seed", 1), ("keep", "png"))),
    ],
)
def test_a_pipeline_or_images_are_given_and_images_without_options_that_draw(options, message):
    with pytest.raises(UsageError, match=message):
        configs.validate(GenerationConfig, {"output": "r.json", **options})


def test_what_is_no_file_of_images_or_damaged_is_one_clear_error(tmp_path):
    path = tmp_path / "images.npz"
    with pytest.raises(UserError, match=r"images\.npz is no folder, and no \.npz file"):
        given_images(path)
    labels = np.arange(20)
    for arrays, message in (
        ({"mu": np.zeros(3)}, "no .npz file with images in arr_0"),
        ({"arr_0": pixels().astype(np.float32)}, r"uint8 \[N, H, W, 3\], not float32 \(20, 16, 16, 3\)"),
        ({"arr_0": pixels().transpose(0, 3, 1, 2)}, r"uint8 \[N, H, W, 3\], not uint8 \(20, 3, 16, 16\)"),
        ({"arr_0": np.asfortranarray(pixels())}, "not uint8 .* columns first"),
        ({"arr_0": pixels()[:, :8]}, "must be square, not 16 x 8 pixels"),
        ({"arr_0": pixels(), "arr_1": labels[:19]}, r"arr_1 must hold a class id.*not int64 \(19,\)"),
        ({"arr_0": pixels(), "arr_1": labels - 1}, r"arr_1 must hold a class id, 0 or more"),
        ({"arr_0": pixels(), "arr_1": labels / 2}, r"arr_1 must hold a class id.*not float64"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            given_images(path)
    np.save(tmp_path / "whole.npy", pixels())
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"images\.npz is damaged at images 16 to 19 \(it ends too early\)"):
        given_images(path).load(range(16, 32))
    for write in (np.savez, np.savez_compressed):
        write(path, arr_0=pixels())
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 255
        path.write_bytes(whole)
        with pytest.raises(UserError, match=r"images\.npz is damaged at images"):
            given_images(path).load(range(20))
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"no \.npz file"):
            given_images(path)


def test_a_folder_is_read_by_name_and_an_image_that_is_damaged_or_of_another_size_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        given_images(tmp_path)
    images = pixels(3)
    for name, image in zip(("b.png", "a.png", "c/a.png"), images, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "settings.json").write_text("{}")
    found = given_images(tmp_path)
    assert (len(found), found.size, found.labels) == (3, 16, [])
    assert np.array_equal(found.load(range(16)).permute(0, 2, 3, 1), images[[1, 0, 2]])
    Image.fromarray(images[0][:, :8]).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is 8 x 16 pixels, the first one 16 x 16"):
        given_images(tmp_path).load(range(16))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"does not decode \(b\.png"):
        given_images(tmp_path).load(range(16))


def test_samples_are_resized_as_pillow_does_and_the_result_says_so(measure_samples, drawn, tmp_path):
    small = measure_samples(resize=8, keep="npz", output=tmp_path / "small.json")
    with np.load(drawn["samples"]["npz"]) as large, np.load(small["samples"]["npz"]) as file:
        expected = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BICUBIC)) for i in large["arr_0"]]
        assert np.array_equal(file["arr_0"], expected)
    given = measure_samples(images=drawn["samples"]["npz"], resize=8)
    assert given["metrics"] == small["metrics"] != drawn["metrics"]
    assert (small["setting"], given["setting"]) == ({"guidance_scale": 1.0, "steps": 50, "resize": 8}, {"resize": 8})
    assert small["data"]["image_size"] == given["data"]["image_size"] == 8
    for result, said in ((small, "Guidance 1, 50 steps, resize 8, sample i"), (given, "Resize 8, drawn by another")):
        write_page(tmp_path / "page.html", [json.loads(json.dumps(result, default=str))], [])
        assert said in (tmp_path / "page.html").read_text()


def test_data_that_nothing_needs_are_not_opened(measure_samples, tiny_extractor, monkeypatch, tmp_path):
    opened, original = [], generation.open_split
    for module in (generation, generation.report, class_accuracy):
        monkeypatch.setattr(module, "open_split", lambda *split: opened.append(split) or original(*split))
    np.savez(tmp_path / "reference.npz", arr_0=pixels())
    how = {"reference": str(tmp_path / "reference.npz"), "protocol": "ours"}
    for source in (IMAGENET, str(tmp_path / "absent")):
        result = measure_samples(**how, data={"source": source})
        assert (opened, result["data"]["source"]) == ([], source)
    assert result["data"]["split"] is None
    assert "not measured: the reference is a file" in result["data"]["note"]
    assert result["metrics"] == measure_samples(**how, labels="balanced")["metrics"]
    write_page(tmp_path / "page.html", [json.loads(json.dumps(result, default=str))], [])
    assert f"16 x 16 pixels, reference {tmp_path / 'reference.npz'};" in (tmp_path / "page.html").read_text()
    for options in ({"labels": "data"}, {"classifier": "features"}, {"features": [tiny_extractor, "none"]}):
        opened.clear()
        result = measure_samples(**how, **options)
        assert opened
        assert result["data"]["split"] == "train"


def test_the_script_measures_given_images(run_script, image_folder, tiny_extractor, tmp_path, capsys):
    np.savez(tmp_path / "own.npz", arr_0=pixels())
    output = tmp_path / "result.json"
    options = {"images": tmp_path / "own.npz", "output": output, "data": image_folder, "features": tiny_extractor}
    options |= {"workers": 0, "cache": "null", "data.max_bad_fraction": 0.3}
    run_script(generation.main, *(word for name, value in options.items() for word in (f"--{name}", value)))
    printed = capsys.readouterr().out
    assert f"20 samples of {tmp_path / 'own.npz'} against test split of {image_folder}; protocol ours" in printed
    assert json.loads(output.read_text())["counts"]["samples"] == 20
