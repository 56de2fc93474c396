import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.errors import UsageError, UserError
from nsvq.tokenizer import make_codebook, teachers
from nsvq.tokenizer.make_codebook import main


@pytest.fixture
def clip(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=12,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    return model


def arguments(tmp_path, *more):
    options = ["--data.source", "synthetic", "--data.image_size", 32, "--encoder", tmp_path / "clip", "--workers", 0]
    return [*options, "--pool", 2, "--images", 20, "--output", tmp_path / "codes.safetensors", *more]


def expected_features(model):
    """Tokens after the final norm and the projection, without the class token, means of 2 x 2 patches."""
    data = DataConfig(source="synthetic", image_size=32)
    images = torch.cat([batch["image"] for batch in eval_batches(data, "train", batch_size=10, limit=20)])
    mean, std = torch.tensor(teachers.CLIP_MEAN), torch.tensor(teachers.CLIP_STD)
    pixels = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        tokens = model.visual_projection(model.vision_model.post_layernorm(hidden))  # (B, 16, 12)
    return tokens.view(20, 2, 2, 2, 2, 12).mean((2, 4)).reshape(-1, 12)


def test_codes_are_a_k_means_fixed_point_of_clips_pooled_patch_features(run_script, clip, tmp_path):
    run_script(main, *arguments(tmp_path, "--codes", 6, "--iterations", 100))
    codes, features = load_file(tmp_path / "codes.safetensors")["features"], expected_features(clip)
    nearest = torch.cdist(features, codes).argmin(1)
    means = torch.stack([features[nearest == i].mean(0) for i in range(6)])
    torch.testing.assert_close(codes, means, atol=2e-3, rtol=1e-2)  # features are kept in float16
    assert not (tmp_path / "codes.parts").exists()


def test_a_python_files_network_gives_the_features_of_its_part(run_script, network_file, tmp_path):
    data = ("--data.source", "synthetic", "--data.image_size", 224, "--images", 4, "--workers", 0, "--pool", 7)
    options = (*data, "--encoder", network_file, "--codes", 16, "--output", tmp_path / "codes.safetensors")
    with pytest.raises(UsageError, match="layer is needed for a Python file"):
        run_script(main, *options)
    run_script(main, *options, "--layer", "stem")
    network = teachers.Registered(network_file).network
    batches = eval_batches(DataConfig(source="synthetic", image_size=224), "train", batch_size=4, limit=4)
    images = torch.cat([batch["image"] for batch in batches])
    stem = F.conv2d((images + 1) / 2 * 4 - 2, network.stem.weight, network.stem.bias, 16)  # (4, 5, 14, 14)
    points = F.avg_pool2d(stem, 7).permute(0, 2, 3, 1).reshape(16, 5)
    codes = load_file(tmp_path / "codes.safetensors")["features"]  # as many as there are points
    assert torch.cdist(points, codes).min(1).values.max() < 2e-3  # features are kept in float16


def test_bad_images_are_told_and_too_many_end_it(run_script, clip, tmp_path, capsys):
    folder = tmp_path / "images" / "ant"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i}.png").write_bytes(b"no picture")
        if i > 1:
            Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(folder / f"{i}.png")
    options = arguments(tmp_path, "--codes", 4, "--data.holdout", 0.2)
    options[options.index("synthetic")] = tmp_path / "images"
    with pytest.raises(UserError, match=r"\d of \d+ images do not decode .*more than data\.max_bad_fraction"):
        run_script(main, *options)
    run_script(main, *options, "--data.max_bad_fraction", 0.2)
    assert "images do not decode, such as" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_without_encoding_again(run_script, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(make_codebook, "SHARD_IMAGES", 8)
    monkeypatch.setattr(make_codebook, "BATCH_IMAGES", 4)
    run_script(main, *arguments(tmp_path, "--codes", 6))
    whole = load_file(tmp_path / "codes.safetensors")["features"]
    (tmp_path / "codes.safetensors").unlink()

    write, load, encoded = make_codebook._write, make_codebook.load_encoder, []

    def counted(*a):
        encode = load(*a)
        return lambda images: encoded.append(len(images)) or encode(images)

    def stopped(path, tensors):
        write(path, tensors)
        if path.name in stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_codebook, "load_encoder", counted)
    monkeypatch.setattr(make_codebook, "_write", stopped)
    stop = []
    for name in ("shard-000001.safetensors", "centroids.safetensors"):
        stop[:] = [name]
        with pytest.raises(KeyboardInterrupt):
            run_script(main, *arguments(tmp_path, "--codes", 6))
    stop.clear()
    with pytest.raises(UserError, match=r"begun with other options.*codes: 6 -> 7"):
        run_script(main, *arguments(tmp_path, "--codes", 7))
    run_script(main, *arguments(tmp_path, "--codes", 6))
    assert sum(encoded) == 20
    torch.testing.assert_close(load_file(tmp_path / "codes.safetensors")["features"], whole)


def test_each_class_has_its_own_codes(tmp_path):
    """Classes far apart: the codes of each lie among its own features."""
    centers = 100.0 * torch.eye(3)
    labels = torch.arange(3).repeat(40)
    features = centers[labels] + torch.randn(120, 3)
    parts = tmp_path / "codes.parts"
    parts.mkdir()
    (parts / "encoded").touch()
    for i, rows in enumerate(torch.arange(120).split(50)):
        save_file({"features": features[rows], "labels": labels[rows]}, parts / f"shard-{i:06d}.safetensors")
    config = make_codebook.CodebookConfig(
        codes=20, per_class=True, data={"source": "synthetic"}, output="x.safetensors"
    )
    with pytest.raises(UsageError, match="10 classes"):
        make_codebook.make(config.model_copy(update={"codes": 25}), parts, torch.device("cpu"))
    for label in range(3):
        assert torch.equal(torch.cat(list(make_codebook.read_parts(parts, label))), features[labels == label])
        points = features[labels == label]
        codes = make_codebook.cluster(
            lambda points=points: iter([points]), 2, config, parts / f"c{label}.safetensors", torch.device("cpu")
        )
        assert torch.cdist(codes, centers).argmin(1).tolist() == [label] * 2


def test_own_features_need_no_encoder(run_script, tmp_path):
    save_file({"features": torch.randn(50, 3)}, tmp_path / "own.safetensors")
    output = tmp_path / "codes.safetensors"
    run_script(main, "--features", tmp_path / "own.safetensors", "--codes", 5, "--output", output)
    assert load_file(output)["features"].shape == (5, 3)
    with pytest.raises(UserError, match="50 < 60"):
        run_script(
            main, "--features", tmp_path / "own.safetensors", "--codes", 60, "--output", tmp_path / "b.safetensors"
        )


def test_a_resumed_k_means_runs_on_the_given_device(monkeypatch, tmp_path):
    state, seen = tmp_path / "centroids.safetensors", {}
    save_file({"centroids": torch.zeros(2, 3), "iterations": torch.tensor(1)}, state)
    load = make_codebook.load_file
    monkeypatch.setattr(make_codebook, "load_file", lambda path, device: seen.update(loaded=device) or load(path))
    monkeypatch.setattr(make_codebook, "kmeans", lambda points, codes, start, **_: start)
    config = make_codebook.CodebookConfig(codes=2, output="x.safetensors")
    make_codebook.cluster(lambda: iter([]), 2, config, state, torch.device("cuda:1"))
    assert seen == {"loaded": "cuda:1"}
