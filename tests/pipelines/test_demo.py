"""The demo: the functions behind its tabs against direct calls, and the page itself, used in a headless Chromium."""

import base64
import importlib.util
import io
import json
import math
import shutil
import socket
import threading
import time
import urllib.request
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image

from nsvq.autoregressive.model import ModelConfig, make_llama
from nsvq.data.images import center_crop
from nsvq.data.synthetic import render
from nsvq.errors import UsageError, UserError
from nsvq.pipelines import demo, explore
from nsvq.pipelines.autoregressive import AutoregressivePipeline
from nsvq.tokenizer.pretrained import Tokenizer

NAMES = {0: "tench", 1: "goldfish", 2: "crane"}
needs_gradio = pytest.mark.skipif(demo.gr is None, reason="gradio is not installed: pip install --editable '.[demo]'")


@pytest.fixture
def tokenizer(tokenizer_folder):
    loaded = Tokenizer.from_pretrained(tokenizer_folder)
    loaded.codebook.normal_()  # one of a new model has equal codes for all, nearly
    return loaded


@pytest.fixture
def tokens_pipeline(vae):
    torch.manual_seed(5)
    model = make_llama(ModelConfig(size="tiny", depth=1, width=32, heads=2), 16, 3, 16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline = AutoregressivePipeline(model, vae, NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pixels(image, size=16):
    """A picture [3, H, W] of `_input` at the tokenizer's size, by Pillow and numpy alone."""
    return torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1)[None] / 127.5 - 1


def _shown(tokenizer, codes):
    return (tokenizer.decode(codes[None])[0] / 2 + 0.5).clamp(0, 1)


def test_a_reconstruction_is_the_decoded_codes_of_the_crop(tokenizer):
    image = render("test", 5, 40)
    found = explore.reconstruct(tokenizer, image)
    codes = tokenizer.encode(_pixels(image))[0]
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.original, _pixels(image)[0] / 2 + 0.5)
    torch.testing.assert_close(found.image, _shown(tokenizer, codes))
    levels = [(part * 255).round().double() for part in (found.image, found.original)]
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / (levels[0] - levels[1]).square().mean()))
    assert torch.equal(found.difference, ((found.image - found.original).abs() * 4).clamp(max=1))


def test_an_edited_token_decodes_as_the_changed_codes(tokenizer):
    codes = tokenizer.encode(_pixels(render("test", 5, 16)))[0]
    before, changed = codes.clone(), codes.clone()
    changed[1, 3] = (codes[1, 3] + 1) % 32
    edited = explore.set_code(codes, 1, 3, int(changed[1, 3]))
    torch.testing.assert_close(explore.decode(tokenizer, edited), _shown(tokenizer, changed))
    assert not torch.allclose(explore.decode(tokenizer, edited), explore.decode(tokenizer, codes))
    swapped = explore.swap_codes(torch.tensor([[1, 2], [3, 1]]), 1, 2)
    assert swapped.tolist() == [[2, 1], [3, 2]]
    assert torch.equal(codes, before), "edits leave their input alone"
    with pytest.raises(ValueError, match="there are 4 rows, 4 columns"):
        explore.set_code(codes, 4, 0, 0)


def test_between_images_goes_from_one_to_the_other_in_latents(tokenizer):
    images = [render("test", i, 16) for i in (5, 8)]
    found = explore.between_images(tokenizer, *images, 5)
    for end, image in zip((found[0], found[4]), images, strict=True):
        torch.testing.assert_close(end, explore.reconstruct(tokenizer, image).image, rtol=0, atol=1e-5)
    a, b = tokenizer.latents(torch.cat([_pixels(image) for image in images])) / 2.0  # its scaling_factor
    middle = ((a + b) / 2).flatten(1).T  # (h w, d)
    codes = (middle[:, None] - tokenizer.codebook).square().sum(2).argmin(1).view(4, 4)
    torch.testing.assert_close(found[2], _shown(tokenizer, codes), rtol=0, atol=1e-5)


def test_code_use_counts_codes_and_averages_their_pixels(tokenizer):
    images = [render("test", i, 16) for i in range(11)]  # more than a batch
    found = explore.code_use(tokenizer, images)
    patches = {}
    for image in images:
        pixels = _pixels(image)
        for place, code in enumerate(tokenizer.encode(pixels).flatten().tolist()):
            row, column = divmod(place, 4)
            patch = pixels[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] / 2 + 0.5
            patches.setdefault(code, []).append(patch)
    assert len(patches) > 3
    assert found.counts.tolist() == sorted(map(len, patches.values()), reverse=True)
    for code, count, patch in zip(found.codes.tolist(), found.counts.tolist(), found.patches, strict=True):
        assert count == len(patches[code])
        torch.testing.assert_close(patch, torch.stack(patches[code]).mean(0))
    share = found.counts.double() / (16 * 11)
    assert found.perplexity == pytest.approx(math.exp(-(share * share.log()).sum()))


def test_near_codes_have_near_colours():
    line = torch.arange(50.0)[torch.randperm(50)]
    colors = explore.code_colors(line[:, None] * torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
    assert colors.shape == (50, 3)
    steps = colors[line.argsort(), 0].diff()
    torch.testing.assert_close(steps.abs(), torch.full_like(steps, 1 / 49))
    assert len(set(steps.sign().tolist())) == 1
    assert explore.code_colors(torch.randn(5, 2))[:, 2].unique().tolist() == [0.5]


def test_generation_shows_its_steps_and_ends_with_the_pipelines_images(pipeline):
    seen = []

    def callback(pipeline, step, timestep, state):
        seen.append(pipeline.decode(state["latents"]))

    how = {"seeds": [3, 4], "num_inference_steps": 5, "guidance_scale": 2.0}
    expected = pipeline([1, 1], output_type="pt", callback_on_step_end=callback, **how).images
    steps, images = zip(*explore.generate(pipeline, [1, 1], 2, **how), strict=True)
    assert steps == (2, 4, 5)
    for found, wanted in zip(images, (seen[1], seen[3], expected), strict=True):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="class 9 does not exist"):
        list(explore.generate(pipeline, [9], 2))


def test_generation_of_tokens_is_grey_where_none_are_yet(tokens_pipeline):
    found = dict(explore.generate(tokens_pipeline, ["crane", None], 6, seeds=[1, 2]))
    assert list(found) == [6, 12, 16]
    expected = tokens_pipeline(["crane", None], seeds=[1, 2], output_type="pt").images
    torch.testing.assert_close(found[16], expected)
    grey = (found[6] == 0.5).all(1)  # (N, H, W)
    there = torch.zeros(4, 4, dtype=torch.bool).flatten().index_fill(0, torch.arange(6), True).view(4, 4)
    assert torch.equal(grey[0], ~there.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_a_generation_that_nobody_waits_for_stops_at_its_next_step(pipeline, monkeypatch):
    evaluations, forward = [], pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *a, **k: evaluations.append(0) or forward(*a, **k))
    running = explore.generate(pipeline, [1], 1, seeds=[0], num_inference_steps=500)
    next(running)
    running.close()
    assert len(evaluations) < 500
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_between_seeds_starts_and_ends_with_the_images_of_the_seeds(pipeline):
    how = {"num_inference_steps": 3}
    found = explore.between_seeds(pipeline, 1, (3, 4), 3, **how)
    expected = pipeline([1, 1], seeds=[3, 4], output_type="pt", **how).images
    torch.testing.assert_close(found[[0, 2]], expected, rtol=0, atol=1e-4)
    noise = sum(torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)) / 2**0.5
    middle = pipeline([1], latents=noise, output_type="pt", **how).images
    torch.testing.assert_close(found[1:2], middle, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"latents must be \(2, 3, 4, 4\), not \(1, 3, 4, 4\)"):
        pipeline([1, 1], latents=noise)


def test_a_picture_keeps_its_pixels_and_their_order():
    images = torch.rand(3, 3, 16, 16)
    found = np.asarray(explore.picture(images, 2))
    factor = found.shape[1] // 35  # two images of 16, and three lines
    assert found.shape == (35 * factor, 35 * factor, 3)
    levels = torch.from_numpy(found[::factor, ::factor].copy()).permute(2, 0, 1) / 255
    for i, image in enumerate(images):
        top, left = 1 + 17 * (i // 2), 1 + 17 * (i % 2)
        torch.testing.assert_close(levels[:, top : top + 16, left : left + 16], image, rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], UsageError, "there is nothing to show: give --pipeline DIR"),
        (["--pipeline", "nowhere"], UserError, "no pipeline at nowhere"),
        (["--tokenizer", "no/such/folder"], UserError, "no tokenizer at no/such/folder"),
        (["--tokenizers", "a"], UsageError, "did you mean tokenizer"),
    ],
)
@needs_gradio
def test_what_cannot_be_shown_is_told_in_one_line(run_script, arguments, error, message):
    with pytest.raises(UserError) as raised:
        run_script(demo.main, *arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)


def test_without_gradio_the_way_to_it_is_told(run_script, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(UserError, match=r"the demo needs Gradio: pip install --editable '\.\[demo\]'"):
        run_script(demo.main, "--tokenizer", tokenizer_folder)


def _tabs(page):
    return [block.label for block in page.blocks.values() if isinstance(block, demo.gr.Tab)]


@needs_gradio
def test_tabs_of_what_is_not_given_are_not_there(pipeline, tokens_pipeline, tokenizer):
    of_tokenizers = ["Reconstruct", "Edit tokens", "Between images", "Codebook"]
    assert _tabs(demo.build(pipeline, {})) == ["Generate", "Between seeds"]
    assert _tabs(demo.build(tokens_pipeline, {})) == ["Generate"]
    assert _tabs(demo.build(None, {"one": tokenizer})) == of_tokenizers
    assert set(_tabs(demo.build(pipeline, {"one": tokenizer}))) == {"Generate", "Between seeds", *of_tokenizers}


class Chromium:
    """A page of the demo in a browser, by what a user sees."""

    def __init__(self, folder):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        quiet = ["background-networking", "component-update", "gpu", "quic", "sync"]
        for argument in ["headless", "no-sandbox", "no-first-run", *(f"disable-{what}" for what in quiet)]:
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={folder / 'profile'}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver, self.folder = webdriver.Chrome(options=options, service=service), folder

    def open(self, address):
        self.resize(1280)
        self.driver.get(address)
        self.until(lambda: self.all("//button[@role='tab']"), "tabs")

    def resize(self, width, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def all(self, path):
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            return [found for found in self.driver.find_elements("xpath", path) if found.is_displayed()]
        except StaleElementReferenceException:  # drawn anew meanwhile
            return []

    def until(self, test, what, seconds=60):
        end = time.monotonic() + seconds
        while not (found := test()):
            assert time.monotonic() < end, f"waited {seconds} s for {what}"
            time.sleep(0.1)
        return found

    def click(self, path):
        button = self.until(lambda: self.all(path), path)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def press(self, text):
        self.click(f"//button[not(@role='tab' or @tabindex='-1') and normalize-space()='{text}']")

    def tab(self, name):
        self.click(f"//button[@role='tab' and normalize-space()='{name}']")

    def says(self, text):
        self.until(lambda: self.all(f"//*[contains(@class, 'prose')]//*[contains(., '{text}')]"), text)

    def fill(self, label, value):
        """Give the number of the slider or field of that label."""
        path = f"//*[contains(@class, 'block')][.//*[normalize-space()='{label}']]//input[@type='number']"
        (field,) = self.all(path)
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(f"{value}\t")

    def images(self, label):
        return self.until(lambda: self.all(f"//img[@alt='{label}']"), f"the picture {label}")

    def pixels(self, label, number=0):
        """A picture as it came over the network, [H, W, 3] uint8."""
        source = self.images(label)[number].get_attribute("src")
        return np.asarray(Image.open(urllib.request.urlopen(source)).convert("RGB"))

    def screenshots(self, name):
        """Of the whole page at both widths; nothing may stick out at the side."""
        for width in (1280, 400):
            self.resize(width)
            time.sleep(0.5)
            inner, content, height = self.driver.execute_script(
                "return [innerWidth, document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            )
            assert content <= inner == width
            self.resize(width, max(height, 500))
            time.sleep(0.3)
            data = self.driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert image.width == width
            image.save(self.folder / f"{name}-{width}.png")
        self.resize(1280)

    def hosts(self):
        """Which hosts the browser asked since the last call, data and its own pages left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        addresses = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        addresses += [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
        return {urlparse(url).hostname for url in addresses if url.startswith(("http", "ws"))}


@pytest.fixture
def chromium(tmp_path):
    if missing := [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]:
        pytest.skip(f"there is no {missing[0]}: on Debian, apt-get install chromium chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed: pip install selenium")
    browser = Chromium(tmp_path)
    yield browser
    browser.driver.quit()


@pytest.fixture
def connected(monkeypatch):
    """The hosts that this process connects to."""
    hosts, connect = set(), socket.socket.connect

    def watched(self, address):
        hosts.add(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return hosts


def _equal(shown, image):
    return np.array_equal(shown, np.asarray(image))


@pytest.mark.slow
@needs_gradio
def test_each_tab_is_used_in_a_browser_that_asks_no_other_host(chromium, connected, pipeline, tokenizer):
    tokenizers = {"first": tokenizer, "second": Tokenizer(tokenizer.model)}
    page = demo.build(pipeline, tokenizers)
    chromium.open(demo.serve(page, prevent_thread_lock=True, quiet=True))
    try:
        chromium.fill("Steps", 4)
        chromium.fill("Preview", 2)
        chromium.press("Generate")
        chromium.says("Step 4. Rows: tench, Tinca tinca, goldfish, crane, crane. Columns: seeds 0 to 3.")
        how = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
        expected = pipeline([i for i in range(4) for _ in range(4)], seeds=[0, 1, 2, 3] * 4, **how).images
        shown = chromium.pixels("Samples").astype(int)
        assert np.abs(shown - np.asarray(explore.picture(expected, 4)).astype(int)).max() <= 1
        chromium.screenshots("generate")

        chromium.tab("Reconstruct")
        found = explore.reconstruct(tokenizer, render("test", 5, 256))
        chromium.says(f"PSNR {found.psnr:.2f} dB. {len(found.codes.unique())} of 32 codes in 16 tokens")
        for i in (0, 1):
            assert _equal(chromium.pixels("Reconstruction", i), explore.picture(found.image))
        upload = chromium.folder / "upload.png"
        render("test", 21, 50).save(upload)
        chromium.click("//button[@aria-label='Remove Image']")
        (field,) = chromium.driver.find_elements("xpath", "//div[@role='tabpanel'][2]//input[@type='file']")
        field.send_keys(str(upload))
        found = explore.reconstruct(tokenizer, Image.open(upload))
        chromium.says(f"PSNR {found.psnr:.2f} dB.")
        assert _equal(chromium.pixels("Tokens"), explore.picture(explore.token_map(tokenizer, found.codes)))
        chromium.screenshots("reconstruct")

        chromium.tab("Edit tokens")
        codes = explore.encode(tokenizer, render("test", 8, 256))
        chromium.says(f"Row 0, column 0: code {codes[0, 0]}. 0 of 16 tokens changed.")
        from selenium.webdriver import ActionChains

        image = chromium.images("Tokens: click one")[0]
        side = min(image.size.values()) / 4
        ActionChains(chromium.driver).move_to_element_with_offset(image, side / 2, -side / 2).click().perform()
        chromium.says(f"Row 1, column 2: code {codes[1, 2]}.")
        other = (int(codes[1, 2]) + 1) % 32
        chromium.fill("Code", other)
        chromium.press("Set code")
        chromium.says(f"Row 1, column 2: code {other}. 1 of 16 tokens changed.")
        edited = explore.set_code(codes, 1, 2, other)
        assert _equal(chromium.pixels("Decoded"), explore.picture(_shown(tokenizer, edited)))
        chromium.fill("Swap", other)
        chromium.fill("with", int(codes[0, 0]))
        chromium.press("Swap everywhere")
        swapped = explore.swap_codes(edited, other, int(codes[0, 0]))
        chromium.says(f"{(swapped != codes).sum()} of 16 tokens changed.")
        assert _equal(chromium.pixels("Decoded"), explore.picture(_shown(tokenizer, swapped)))
        chromium.screenshots("edit")
        chromium.press("Reset")
        chromium.says("0 of 16 tokens changed.")

        chromium.tab("Between images")
        chromium.press("Interpolate")
        images = [render("test", i, 256) for i in (5, 8)]
        expected = explore.between_images(tokenizer, *images, 8)
        assert _equal(chromium.pixels("Latents between, quantized and decoded"), explore.picture(expected, 4))
        chromium.screenshots("between-images")

        chromium.tab("Between seeds")
        chromium.fill("Steps", 2)
        # Before the page does, since they share the pipeline's scheduler.
        expected = explore.between_seeds(pipeline, 0, (0, 1), 8, num_inference_steps=2, guidance_scale=2.0)
        chromium.press("Interpolate")
        assert _equal(chromium.pixels("Noise between"), explore.picture(expected, 4))
        chromium.screenshots("between-seeds")

        chromium.tab("Codebook")
        chromium.press("Look")
        use = explore.code_use(tokenizer, [render("test", i, 16) for i in range(64)])
        chromium.says(f"{len(use.codes)} of 32 codes in 1,024 tokens of 64 images")
        patch = (use.patches[0] * 255).round().byte().permute(1, 2, 0)
        assert _equal(chromium.pixels(f"code {use.codes[0]}"), patch)
        assert chromium.all(f"//div[img and contains(., '{use.codes[0]}') and contains(., '{use.counts[0]} times')]")
        assert len(chromium.all("//img[starts-with(@alt, 'code ')]")) == len(use.codes)
        chromium.screenshots("codebook")
        assert chromium.hosts() == {"127.0.0.1"}
        assert {host for host in connected if host not in ("127.0.0.1", "localhost", "::1")} == set()
    finally:
        page.close()


@pytest.mark.slow
@needs_gradio
def test_an_autoregressive_pipeline_generates_in_the_browser(chromium, tokens_pipeline):
    page = demo.build(tokens_pipeline, {})
    chromium.open(demo.serve(page, prevent_thread_lock=True, quiet=True))
    try:
        chromium.fill("Top k", 5)
        chromium.press("Generate")
        chromium.says("Step 16. Rows: tench, goldfish, crane. Columns: seeds 0 to 3.")
        labels = [i for i in range(3) for _ in range(4)]
        how = {"seeds": [0, 1, 2, 3] * 3, "guidance_scale": 2.0, "top_k": 5, "output_type": "pt"}
        assert _equal(chromium.pixels("Samples"), explore.picture(tokens_pipeline(labels, **how).images, 4))
        chromium.screenshots("tokens")
    finally:
        page.close()
