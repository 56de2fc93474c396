import hashlib
import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from nsvq.data import loading
from nsvq.data.config import DataConfig
from nsvq.data.images import center_crop, several_crops, to_tensor
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError
from nsvq.tokenizer import encode
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.latents import LatentCache, code_batches, train_batches
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.vqmodel import QuantizerVQModel


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(encode, "SHARD_IMAGES", 16)
    monkeypatch.setattr(encode, "BATCH_IMAGES", 8)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def data(image_folder):
    return DataConfig(source=str(image_folder), image_size=16, holdout=0.05)


@pytest.fixture
def cache(tmp_path, tokenizer, data, accelerator):
    return open_cache(tmp_path / "latents", tokenizer, data, accelerator)


def contents(folder):
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def test_cache_holds_the_latents_of_every_image_and_of_its_mirror_image(cache, tokenizer, data):
    images = open_split(data, "train")
    assert len(cache) == len(images) == 44
    assert len(cache.manifest["shards"]) == 3
    assert cache.classes == ["ant", "bee"]
    assert cache.shape == (3, 4, 4)
    for i in range(len(images)):
        image, label = images.load(i)
        pixels = to_tensor([center_crop(image, 16)])
        mirrored = torch.from_numpy(pixels.numpy()[..., ::-1].copy())
        for flip, view in enumerate((pixels, mirrored)):
            latents, found = cache.read(i, flip)
            assert latents.dtype == torch.float16
            torch.testing.assert_close(latents.float(), tokenizer.latents(view)[0], rtol=1e-3, atol=1e-3)
            assert found == label
    assert not torch.equal(cache.read(0, 0)[0], cache.read(0, 1)[0])


def test_without_flips_only_the_images_are_cached(tmp_path, tokenizer, data, accelerator, cache):
    plain = open_cache(tmp_path / "plain", tokenizer, data.model_copy(update={"flip": False}), accelerator)
    assert plain.views == 1
    assert all(torch.equal(plain.read(i, 0)[0], cache.read(i, 0)[0]) for i in range(len(cache)))


def test_with_several_crops_each_is_cached_with_its_mirror_image(tmp_path, tokenizer, data, accelerator, cache, capsys):
    capsys.readouterr()
    several = open_cache(tmp_path / "several", tokenizer, data, accelerator, crops=3)
    assert "44 images x 3 crops x 2 flips" in capsys.readouterr().out
    assert several.views == 6
    images = open_split(data, "train")
    for i in range(0, len(images), 7):
        image, label = images.load(i)
        pixels = to_tensor(several_crops(image, 16, 3, images.id(i)))
        expected = tokenizer.latents(torch.cat([pixels, pixels.flip(-1)]))  # (crops of both flips, C, h, w)
        for crop in range(3):
            for flip in range(2):
                latents, found = several.read(i, 2 * crop + flip)
                torch.testing.assert_close(latents.float(), expected[3 * flip + crop], rtol=1e-3, atol=1e-3)
                assert found == label
        assert torch.equal(several.read(i, 0)[0], cache.read(i, 0)[0])
    batches = train_batches(several, batch_size=44, seed=0)
    seen = {row.numpy().tobytes() for _ in range(30) for row in next(batches)["latents"]}
    assert len(seen) > 0.95 * 44 * 6  # views come over time: e^-5 of them are not seen in 30 epochs


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_full_disk_ends_the_cache_and_loses_no_shard_that_is_there(
    tmp_path, tokenizer, data, accelerator, cache, monkeypatch, full_at
):
    written = []

    def save(tensors, path, metadata):
        written.append(path)
        if len(written) == full_at + 1:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    folder = tmp_path / "small disk"
    monkeypatch.setattr(encode, "save_file", save)
    with pytest.raises(UserError, match=r"No space left on device.*the next start goes on from the shards there are"):
        open_cache(folder, tokenizer, data, accelerator)
    assert len(contents(folder)) == full_at
    assert not (folder / "manifest.json").exists()
    again = open_cache(folder, tokenizer, data, accelerator)
    assert len(written) == 4
    assert again.manifest == cache.manifest


def test_quantized_latents_are_codes_and_decode_to_the_same_images(tmp_path, tokenizer, data, accelerator, cache):
    codes = open_cache(tmp_path / "codes", tokenizer, data, accelerator, kind="quantized")
    scale, table = tokenizer.model.config.scaling_factor, tokenizer.codebook
    for i in range(0, len(cache), 9):
        rows = codes.read(i, 1)[0].float().flatten(1).T / scale  # (h w, d)
        nearest = torch.cdist(cache.read(i, 1)[0].float().flatten(1).T / scale, table).argmin(1)
        torch.testing.assert_close(rows, table[nearest], rtol=1e-3, atol=1e-4)
    pair = torch.stack([cache.read(0, 0)[0], codes.read(0, 0)[0]]).float() / scale
    with torch.no_grad():
        continuous, quantized = tokenizer.model.decode(pair).sample
    torch.testing.assert_close(quantized, continuous)
    assert codes.manifest["std"] != cache.manifest["std"]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_a_cache_of_codes_gives_back_what_the_tokenizer_encodes(
    tmp_path, tokenizer, data, accelerator, cache, capsys, monkeypatch, size, dtype
):
    high, real = size - 32, Tokenizer.encode  # the highest indices that the type has to hold
    monkeypatch.setattr(Tokenizer, "encode", lambda self, images: real(self, images) + high)
    monkeypatch.setattr(Tokenizer, "codebook_size", size)
    capsys.readouterr()
    codes = open_cache(tmp_path / "codes", tokenizer, data, accelerator, kind="codes")
    assert f"44 images x 2 flips, {44 * 2 * 16 * dtype.itemsize / 2**30:.2f} GiB" in capsys.readouterr().out
    assert (len(codes), codes.views, codes.shape) == (44, 2, (4, 4))
    images = open_split(data, "train")
    for i in range(0, len(images), 5):
        image, label = images.load(i)
        pixels = to_tensor([center_crop(image, 16)])
        for flip, view in enumerate((pixels, pixels.flip(-1))):
            stored, found = codes.read(i, flip)
            assert (stored.dtype, found) == (dtype, label)
            assert torch.equal(stored.long(), tokenizer.encode(view)[0])
    assert next(code_batches(codes, batch_size=44, seed=0))["codes"].min() >= high
    assert open_cache(codes.folder, tokenizer, data, accelerator, kind="codes", verify=True).manifest == codes.manifest
    with pytest.raises(UserError, match="holds codes of another setting of latents"):
        open_cache(codes.folder, tokenizer, data, accelerator)
    with pytest.raises(UserError, match="holds latents of another setting of latents"):
        open_cache(cache.folder, tokenizer, data, accelerator, kind="codes")


def test_batches_of_codes_depend_on_their_position_alone(tmp_path, tokenizer, data, accelerator):
    codes = open_cache(tmp_path / "codes", tokenizer, data, accelerator, kind="codes")

    def taken(count, **options):
        batches = code_batches(codes, **{"batch_size": 8, "seed": 3} | options)
        return join([next(batches) for _ in range(count)])

    expected = taken(12)
    assert expected["codes"].dtype == torch.int64
    assert same(taken(10, start=16), {name: value[16:] for name, value in expected.items()})
    assert same(taken(12, workers=2), expected)
    second = taken(12, batch_size=4, rank=1, world_size=2)
    assert same(second, {name: value.unflatten(0, (12, 8))[:, 4:].flatten(0, 1) for name, value in expected.items()})
    stored = {
        (*codes.read(i, flip)[0].flatten().tolist(), codes.read(i, flip)[1]) for i in range(44) for flip in (0, 1)
    }
    seen = {(*c.flatten().tolist(), int(y)) for c, y in zip(expected["codes"], expected["labels"], strict=True)}
    assert seen <= stored
    assert len(seen) > 44  # both flips
    assert 0.3 < expected["drop_uniform"].mean() < 0.7
    assert len(expected["drop_uniform"].unique()) == 96


def test_quantized_latents_are_refused_where_codes_are_not_their_own_nearest_ones(tmp_path, data, accelerator):
    model = QuantizerVQModel(
        quantizer={"name": "fsq", "levels": [8, 8, 8]},
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        num_vq_embeddings=512,
        vq_embed_dim=3,
        sample_size=16,
    )
    with pytest.raises(UsageError, match=r"latents: quantized needs a tokenizer whose codes.*use latents: continuous"):
        open_cache(tmp_path / "latents", Tokenizer(model), data, accelerator, kind="quantized")


def test_clones_of_a_code_may_stand_for_each_other(tmp_path, tokenizer, data, accelerator, monkeypatch):
    table, quantize = tokenizer.codebook.detach(), Tokenizer.quantize
    table[1] = table[0] + 5e-3 * table.std()

    def confused(self, z):
        found = quantize(self, z)
        return torch.where(found < 2, 1 - found, found)

    monkeypatch.setattr(Tokenizer, "quantize", confused)
    open_cache(tmp_path / "codes", tokenizer, data, accelerator, kind="quantized")
    table[1] = table[0] + 5e-2 * table.std()
    with pytest.raises(UsageError, match="codes are their own nearest codes"):
        open_cache(tmp_path / "others", tokenizer, data, accelerator, kind="quantized")


def test_the_manifest_holds_the_checksums_of_the_shards(cache):
    for shard in cache.manifest["shards"]:
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(cache.folder / shard["file"]).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        assert shard["sha256"] == digest.hexdigest()
        assert shard["bytes"] == (cache.folder / shard["file"]).stat().st_size


def test_a_damaged_shard_is_found_by_its_size_or_on_request_by_its_checksum_and_encoded_again(
    cache, tokenizer, data, accelerator
):
    path = cache.folder / cache.manifest["shards"][1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(open_cache(cache.folder, tokenizer, data, accelerator)) == 44
    with pytest.raises(UserError, match=rf"{path.name} not what was written: delete manifest.json and these shards"):
        open_cache(cache.folder, tokenizer, data, accelerator, verify=True)
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{path.name} not of the size that was written: delete manifest.json"):
        open_cache(cache.folder, tokenizer, data, accelerator)
    path.unlink()
    (cache.folder / "manifest.json").unlink()
    again = open_cache(cache.folder, tokenizer, data, accelerator)
    assert again.manifest == cache.manifest
    assert open_cache(cache.folder, tokenizer, data, accelerator, verify=True).manifest == cache.manifest


def test_statistics_are_those_of_all_latents(cache):
    latents = torch.cat([part["latents"] for part in contents(cache.folder).values()]).double().numpy()
    np.testing.assert_allclose(cache.manifest["mean"], latents.mean((0, 1, 3, 4)), atol=1e-4)
    np.testing.assert_allclose(cache.manifest["std"], latents.std((0, 1, 3, 4)), rtol=1e-3)
    np.testing.assert_allclose(cache.manifest["overall_std"], latents.std(), rtol=1e-3)


def test_an_interrupted_cache_goes_on_from_its_complete_shards(
    tmp_path, tokenizer, data, accelerator, cache, monkeypatch
):
    folder, encoded = tmp_path / "interrupted", []
    real = Tokenizer.latents

    def counted(self, images, limit=None):
        encoded.append(len(images))
        if limit is not None and len(encoded) > limit:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(Tokenizer, "latents", lambda self, images: counted(self, images, limit=6))
    with pytest.raises(KeyboardInterrupt):  # in the second shard: one has 2 batches, of 2 flips each
        open_cache(folder, tokenizer, data, accelerator)
    assert not (folder / "manifest.json").exists()
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("shard-*")}
    assert len(kept) == 1
    encoded.clear()
    monkeypatch.setattr(Tokenizer, "latents", counted)
    resumed = open_cache(folder, tokenizer, data, accelerator)
    assert sum(encoded) == 2 * (44 - 16)
    assert (
        kept.items() <= {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}.items()
    )
    whole, parts = contents(cache.folder), contents(folder)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[n][k], parts[n][k]) for n in whole for k in ("latents", "labels"))
    assert resumed.manifest == cache.manifest


def test_a_complete_cache_is_used_as_it_is(cache, tokenizer, data, accelerator, monkeypatch):
    monkeypatch.setattr(Tokenizer, "latents", None)
    again = open_cache(cache.folder, tokenizer, data, accelerator)
    assert again.manifest == cache.manifest


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("changed", ["tokenizer", "data", "size", "limit", "flip", "crops", "latents"])
def test_a_stale_cache_is_refused(cache, tokenizer, data, accelerator, other_tokenizer_folder, changed, complete):
    if not complete:
        (cache.folder / "manifest.json").unlink()
    how = {}
    if changed == "tokenizer":
        tokenizer, what = Tokenizer.from_pretrained(other_tokenizer_folder), "another tokenizer"
    elif changed == "data":
        data, what = data.model_copy(update={"source": "synthetic"}), "other data"
    elif changed == "size":
        data, what = data.model_copy(update={"image_size": 32}), "another image size"
    elif changed == "flip":
        data, what = data.model_copy(update={"flip": False}), "another data.flip"
    else:
        how, what = {
            "limit": ({"limit": 20}, "another cache_images"),
            "crops": ({"crops": 2}, "another cache_crops"),
            "latents": ({"kind": "quantized"}, "another setting of latents"),
        }[changed]
    with pytest.raises(UserError) as error:
        open_cache(cache.folder, tokenizer, data, accelerator, **how)
    assert str(error.value) == (f"{cache.folder} holds latents of {what}: delete that folder, or give another --cache")


def test_a_cache_that_lost_a_shard_is_refused(cache):
    next(cache.folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"has lost shard-.*: delete that folder"):
        LatentCache(cache.folder)


def test_a_limited_cache_is_spread_over_the_data(tmp_path, tokenizer, data, accelerator):
    limited = open_cache(tmp_path / "limited", tokenizer, data, accelerator, limit=20)
    labels = [limited.read(i, 0)[1] for i in range(len(limited))]
    assert len(labels) == 20
    assert 5 <= sum(labels) <= 15


def test_bad_images_are_left_out_and_counted_up_to_a_limit(tmp_path, tokenizer, image_folder, accelerator):
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    for i in (2, 7, 30):
        next(broken.glob(f"*/{i:02}.png")).write_bytes(b"no image")
    data = DataConfig(source=str(broken), image_size=16, holdout=0.05, max_bad_fraction=0.1)
    cache = open_cache(tmp_path / "latents", tokenizer, data, accelerator)
    assert cache.manifest["bad_images"] + len(cache) == 44
    assert cache.manifest["bad_images"] in (2, 3)  # one may be held out
    assert sum(len(part["labels"]) for part in contents(cache.folder).values()) == len(cache)
    with pytest.raises(UserError, match=r"of 44 images of .* do not decode.*max_bad_fraction = 0.01"):
        open_cache(tmp_path / "other", tokenizer, data.model_copy(update={"max_bad_fraction": 0.01}), accelerator)
    # Nor does a second start pass over what the first one left out.
    strict = data.model_copy(update={"max_bad_fraction": 0.01})
    with pytest.raises(UserError, match="max_bad_fraction"):
        open_cache(tmp_path / "other", tokenizer, strict, accelerator)


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, tokenizer, data, accelerator, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Tokenizer, "latents", None)
    with pytest.raises(UserError, match="give a --cache on a larger one"):
        open_cache(tmp_path / "latents", tokenizer, data, accelerator)
    assert "44 images x 2 flips, 0.00 GiB" in capsys.readouterr().out


def test_an_image_size_that_the_tokenizer_cannot_take_is_refused(tmp_path, tokenizer, data, accelerator):
    with pytest.raises(UsageError, match=r"data.image_size = 18 must be a multiple of the tokenizer's f = 4"):
        open_cache(tmp_path / "latents", tokenizer, data.model_copy(update={"image_size": 18}), accelerator)


class Rank:
    """What the division of work asks an accelerator."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def test_ranks_divide_the_shards_that_are_missing_and_each_reads_its_own_by_one_loader(
    cache, tokenizer, data, monkeypatch
):
    loaders, real = [], loading.make_loader
    monkeypatch.setattr(
        "nsvq.data.batches.make_loader", lambda *given, **how: loaders.append(how) or real(*given, **how)
    )
    images = open_split(data, "train")

    def shares(ranks, missing):
        """(shard, labels of each of its batches) of every rank."""
        parts = [Rank(rank, ranks) for rank in range(ranks)]
        jobs = [
            encode._Encoding(cache.folder, tokenizer, data, images, part, cache.manifest["key"], 0) for part in parts
        ]
        return [[(i, [b["label"].tolist() for b in found]) for i, found in job.shards(missing)] for job in jobs]

    labels = images.labels().tolist()
    whole = [(k, [labels[i : i + 8] for i in range(16 * k, min(44, 16 * k + 16), 8)]) for k in range(3)]
    assert shares(1, [0, 1, 2]) == [whole]
    assert shares(2, [0, 1, 2]) == [whole[::2], whole[1:2]]
    assert shares(2, [1]) == [whole[1:2], []]
    assert shares(1, [1, 2]) == [whole[1:]]
    assert len(loaders) == 6  # one a rank


@pytest.fixture
def on_two_ranks(as_two_ranks, tokenizer, data, monkeypatch):
    """on_two_ranks(folder of each): what `open_cache` gives there, its manifest or the text of a `UserError`."""
    monkeypatch.setattr(encode, "_LATE", 0)

    def run(folders):
        def opened(rank):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            environment |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
            os.environ.update({name: str(value) for name, value in environment.items()})
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=True)
            assert accelerator.num_processes == 2
            try:
                return open_cache(folders[rank], tokenizer, data, accelerator).manifest
            except UserError as error:
                return str(error)

        return as_two_ranks(opened)

    return run


def test_two_ranks_fill_a_cache_as_one_does(cache, on_two_ranks, tmp_path):
    folder = tmp_path / "shared"
    for _ in range(2):  # encoded, then found complete
        assert on_two_ranks([folder, folder]) == [cache.manifest] * 2
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("complete", [False, True])
def test_folders_of_nodes_of_their_own_end_every_rank_before_the_work(cache, on_two_ranks, tmp_path, complete):
    folders = [cache.folder if complete else tmp_path / "node-0", tmp_path / "node-1"]
    for folder, said in zip(folders, on_two_ranks(folders), strict=True):
        assert said.startswith(f"not every rank sees {folder}/")
        assert said.endswith("give a --cache on a file system that all nodes share")
    assert not list(tmp_path.glob("node-*/*"))


def test_a_cache_is_complete_with_all_of_its_shards_alone(tmp_path, tokenizer, data, accelerator, cache, monkeypatch):
    folder, real = tmp_path / "part", encode._Encoding.shards
    with monkeypatch.context() as patch:  # those of another node
        patch.setattr(encode, "_LATE", 0)
        patch.setattr(encode._Encoding, "shards", lambda self, missing: real(self, missing[:1]))
        with pytest.raises(UserError, match=r"lacks 2 of 3 shards, such as shard-000001-of-000003.*all nodes share"):
            open_cache(folder, tokenizer, data, accelerator)
    assert not (folder / "manifest.json").exists()
    assert open_cache(folder, tokenizer, data, accelerator).manifest == cache.manifest


def test_a_file_that_a_network_shows_late_is_waited_for(tmp_path, monkeypatch):
    late = tmp_path / "late"
    monkeypatch.setattr(encode.time, "sleep", lambda seconds: late.touch())
    assert encode._absent([late]) == []


def test_a_second_run_may_fill_the_same_cache_at_the_same_time(
    tmp_path, tokenizer, data, accelerator, cache, monkeypatch
):
    folder, written = tmp_path / "both", []

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) == 1:  # the other run writes all of it before the first shard has its name
            with monkeypatch.context() as patch:
                patch.setattr("nsvq.files.os.getpid", lambda: -1)
                open_cache(folder, tokenizer, data, accelerator)

    monkeypatch.setattr(encode, "save_file", save)
    assert open_cache(folder, tokenizer, data, accelerator).manifest == cache.manifest
    assert len(written) == 6
    assert len(list(folder.iterdir())) == 4


def test_what_a_kill_leaves_of_a_shard_goes_with_the_next_start(tmp_path, tokenizer, data, accelerator):
    (tmp_path / "tokens").mkdir()
    left, written = (tmp_path / "tokens" / f".shard-000000-of-000003.safetensors.node.{i}.part" for i in range(2))
    written.touch()
    left.touch()
    os.utime(left, times=(0, time.time() - 4000))
    open_cache(tmp_path / "tokens", tokenizer, data, accelerator)
    assert (left.exists(), written.exists()) == (False, True)


def test_a_damaged_manifest_is_told_and_made_again_from_the_shards(cache, tokenizer, data, accelerator, monkeypatch):
    (cache.folder / "manifest.json").write_text("")
    for read in (lambda: LatentCache(cache.folder), lambda: open_cache(cache.folder, tokenizer, data, accelerator)):
        with pytest.raises(UserError, match=r"manifest.json is damaged .*: delete it and start again, which keeps"):
            read()
    (cache.folder / "manifest.json").unlink()
    monkeypatch.setattr(Tokenizer, "latents", None)
    assert open_cache(cache.folder, tokenizer, data, accelerator).manifest == cache.manifest


# Reading


def take(cache, count, **options):
    batches = train_batches(cache, **{"batch_size": 8, "seed": 3} | options)
    return [next(batches) for _ in range(count)]


def join(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "id"}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_samples_depend_on_their_position_alone(cache):
    expected = join(take(cache, 4))
    assert same(join(take(cache, 2, start=16)), {name: value[16:] for name, value in expected.items()})
    assert same(join(take(cache, 4, workers=2)), expected)
    ranks = [take(cache, 8, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert same(join([batch for pair in zip(*ranks, strict=True) for batch in pair]), expected)
    assert not same(join(take(cache, 4, seed=4)), expected)


def test_no_more_processes_are_started_than_shared_memory_has_room_for(cache, monkeypatch, capsys):
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    before = psutil.Process().children()
    next(batches := train_batches(cache, batch_size=8, seed=3, workers=2))
    assert set(psutil.Process().children()) <= set(before)
    assert "has room for the batches of 0 loading processes, not 2" in capsys.readouterr().err
    batches.close()


def test_every_image_comes_once_an_epoch_and_both_flips_come_over_time(cache):
    stored = {cache.read(i, flip)[0].numpy().tobytes(): (i, flip) for i in range(44) for flip in range(2)}
    batches = train_batches(cache, batch_size=44, seed=0)
    epochs = [[stored[row.numpy().tobytes()] for row in next(batches)["latents"]] for _ in range(6)]
    assert all(sorted(i for i, _ in epoch) == list(range(44)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    flips = [flip for epoch in epochs for _, flip in epoch]
    assert 0.4 < sum(flips) / len(flips) < 0.6


def test_the_draws_of_samples_are_independent_and_of_their_distributions(cache):
    batch = join(take(cache, 50, batch_size=44))
    count = len(batch["labels"])
    noise = batch["noise"].double()
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert len({row.numpy().tobytes() for row in batch["noise"]}) == count
    assert batch["time_normal"].std().item() == pytest.approx(1, abs=0.06)
    assert batch["drop_uniform"].mean().item() == pytest.approx(0.5, abs=0.03)
    draws = torch.stack(
        [batch["time_normal"], batch["drop_uniform"], batch["noise"][:, 0, 0, 0], batch["noise"][:, 1, 0, 0]]
    )
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.08


def test_manifest_names_what_the_cache_is_of(cache, tokenizer, data):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["key"]["tokenizer"] == tokenizer.fingerprint()
    assert manifest["key"]["data"] == open_split(data, "train").fingerprint
    assert manifest["key"]["image_size"] == 16
    assert (manifest["count"], manifest["shape"], manifest["dtype"]) == (44, [2, 3, 4, 4], "float16")
