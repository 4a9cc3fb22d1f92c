"""`lightningdit demo`: its functions without a browser, its page in a headless Chromium (Debian: apt install chromium chromium-driver)."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import cli, pictures
from lightningdit import demo as demonstration
from lightningdit.demo import Painter, Stopped, import_gradio, page
from lightningdit.trained import load_run

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CODE = "from lightningdit.cli import main; raise SystemExit(main())"


@pytest.fixture(scope="module")
def weights(digits_model, tmp_path_factory):
    return digits_model(tmp_path_factory.mktemp("demo"), depth=2, std=0.2)


@pytest.fixture(scope="module")
def painter(weights):
    settings, model, decoder, _ = load_run(weights[1], weights[3], weights[5])
    settings.precision = "fp32"
    return Painter(settings, model, decoder, [f"digit {i}" for i in range(10)], torch.device("cpu"))


def sampled(weights, out, *options):
    """The picture that `lightningdit sample` makes."""
    assert cli.main(["sample", *weights, "--num", "1", "--precision", "fp32", "--out", str(out), *options]) == 0
    return np.asarray(Image.open(out))


def test_the_image_is_that_of_the_sample_command(weights, painter, tmp_path):
    *way, (last, done) = painter.draw("digit 7", 5, 2.5, 12)
    expected = sampled(weights, tmp_path / "a.png", "--classes", "7", "--seed", "5", "--guidance-scale", "2.5", "--num-steps", "12")
    assert np.array_equal(last, expected) and last.shape == (48, 48, 3) and done == 1.0 and last.std() > 10
    shares = [share for _, share in way]
    assert len(way) == 12 and shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    strip = pictures.denoising_strip(painter.model, painter.decoder, labels=[7], seeds=[5], columns=13,
                                     **painter.arguments | dict(guidance_scale=2.5, num_steps=12))
    for picture, data in zip([*(p for p, _ in way), last], strip[1], strict=True):  # the data predicted at each step
        assert np.array_equal(picture[::6, ::6, 0], data[:, :, 0].numpy())
    assert len(list(painter.draw("digit 7", 5, 1.0, 100))) <= demonstration.PREVIEWS + 1
    other = list(painter.draw("digit 7", 6, 2.5, 12))[-1][0]
    assert not np.array_equal(other, last)


@pytest.mark.parametrize(("entered", "message"), [
    (("digit 7", -1, 1, 5), "Seed: got -1, expected a whole number from 0 to 4294967295"), (("digit 7", 2**32, 1, 5), "Seed: got"),
    (("digit 7", 1.5, 1, 5), "Seed: got 1.5"), (("digit 7", None, 1, 5), "Seed: got None"), (("digit 7", 0, 1, 0), "Steps: got 0"),
    (("digit 7", 0, 1, 2.5), "Steps: got 2.5"), (("digit 7", 0, 1, 10**9), "Steps: got"), (("cat", 0, 1, 5), "Class: got 'cat'"),
    (("digit 7", 0, float("nan"), 5), "Guidance scale: got"), (("digit 7", 0, 1e9, 5), "Guidance scale: got"),
    (("digit 7", 0, "2", 5), "Guidance scale: got")])
def test_what_cannot_be_drawn(painter, entered, message):
    with pytest.raises(ValueError, match=message):
        next(painter.draw(*entered))


def test_one_at_a_time_and_stopping(painter):
    first = painter.draw("digit 1", 0, 2.0, 1000)
    next(first)
    got = []
    second = threading.Thread(target=lambda: got.extend(painter.draw("digit 2", 0, 2.0, 2)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not got  # waits for the first
    painter.stop()
    with pytest.raises(Stopped):
        list(first)
    second.join(60)
    assert len(got) == 3 and got[-1][1] == 1.0
    abandoned = painter.draw("digit 1", 0, 2.0, 1000)
    next(abandoned)
    abandoned.close()  # as when the tab is closed
    assert not painter.one_at_a_time.locked() and len(list(painter.draw("digit 2", 0, 2.0, 2))) == 3


def test_methods_without_a_way_to_show_are_refused(painter, weights):
    settings, model, decoder, _ = load_run(weights[1], weights[3], weights[5])
    settings.sample.method = "dopri5"
    with pytest.raises(ValueError, match="method: got 'dopri5', expected --method with one of euler"):
        Painter(settings, model, decoder, None, torch.device("cpu"))
    with pytest.raises(SystemExit, match="port: got 0"):
        cli.main(["demo", *weights, "--port", "0"])


def test_without_gradio(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"error: the demo needs gradio 6: pip install 'gradio>=6'"):
        cli.main(["demo", *weights])


def test_the_page_is_silent_and_draws(painter, tmp_path):
    gradio = import_gradio()
    blocks = page(gradio, painter, tmp_path)
    assert blocks.analytics_enabled is False and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    draw = next(f for f in blocks.fns.values() if f.api_name == "draw")
    assert draw.concurrency_limit == 1 and {f.concurrency_id for f in blocks.fns.values() if f.fn is draw.fn} == {"draw"}
    steps = list(draw.fn("digit 3", 4, 1.0, 6))
    picture, text, file = steps[-1]
    assert "digit 3" in text and "seed 4" in text and np.array_equal(np.asarray(Image.open(file["value"])), picture)
    assert len(steps) == 8 and "Waiting" in steps[0][1] and "0 % of the steps" in steps[1][1]
    assert "**Not drawn.** Steps: got 0" in list(draw.fn("digit 3", 4, 1.0, 0))[-1][1]


# In a browser


@pytest.fixture(scope="module")
def server(weights):
    """Address of a running demo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, "-c", CODE, "demo", *weights, "--port", str(port)], env=environment, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180  # on busy cores 50 s were seen
    while True:
        assert process.poll() is None and time.monotonic() < deadline, (process.kill(), process.communicate()[0])
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield address
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1100,860"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def enter(browser, field, value):
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element("css selector", f"#{field} input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(value), Keys.TAB)
    wait(lambda: box.get_attribute("value") == str(value), f"{value} as {field}")


def wait(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {seconds} s")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium to click through the demo: apt install chromium chromium-driver")
def test_clicked_through_in_a_browser(weights, server, browser, tmp_path):
    expected = sampled(weights, tmp_path / "a.png", "--classes", "3", "--seed", "11", "--guidance-scale", "2", "--num-steps", "600")

    def status():
        return browser.execute_script("return document.querySelector('#status')?.innerText || ''")

    def shown():
        """The pixels of the picture on the page, (H, W, 3)."""
        values = browser.execute_script("""
            const image = document.querySelector('#picture img');
            if (!image || !image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            return [canvas.height, canvas.width, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];""")
        return None if values is None else np.array(values[2], np.uint8).reshape(values[0], values[1], 4)[..., :3]

    browser.get(server)
    wait(lambda: "Choose a class" in status(), "the page")
    # A preview may have come and gone between two questions of this process, which may have to wait for a core: the page takes notes.
    browser.execute_script("""
        window.texts = []; window.pictures = [];
        new MutationObserver(() => {
            const text = document.querySelector('#status')?.innerText, picture = document.querySelector('#picture img')?.src;
            if (text && texts.at(-1) !== text) texts.push(text);
            if (picture && pictures.at(-1) !== picture) pictures.push(picture);
        }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});""")
    enter(browser, "seed", 11)
    enter(browser, "scale", 2)
    for field, bad, good in (("steps", 0, 600), ("seed", -4, 11)):  # a message, and the page goes on
        enter(browser, field, bad)
        browser.find_element("id", "draw").click()
        wait(lambda: "Not drawn" in status() and f"got {bad}" in status(), "the message")  # noqa: B023
        enter(browser, field, good)
    browser.find_element("css selector", "#class input").click()
    options = "ul[role=listbox] li"
    wait(lambda: [e for e in browser.find_elements("css selector", options) if e.text.strip().endswith("3")], "classes")[0].click()
    browser.find_element("id", "draw").click()
    wait(lambda: status() == "3, seed 11, guidance 2, 600 steps", "the image")
    wait(lambda: np.array_equal(shown(), expected), "the image of lightningdit sample")
    texts, pictures = browser.execute_script("return [texts, pictures]")
    assert any("% of the steps" in text for text in texts), texts
    early = np.asarray(Image.open(urllib.request.urlopen(pictures[0])).convert("RGB"))
    assert len(set(pictures)) > 1 and early.shape == expected.shape and not np.array_equal(early, expected)
    browser.find_element("id", "download").click()
    file = tmp_path / "3_seed_11.png"
    wait(file.is_file, "the download")
    assert np.array_equal(np.asarray(Image.open(file)), expected)
    browser.save_screenshot(os.environ.get("DEMO_SCREENSHOT", str(tmp_path / "page.png")))

    enter(browser, "steps", demonstration.LARGEST["steps"])
    browser.find_element("id", "draw").click()
    wait(lambda: "% of the steps" in status(), "a preview")
    browser.find_element("id", "stop").click()
    wait(lambda: status() == "Stopped.", "the end")

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"}
    answered = {r["params"]["response"]["url"] for r in requests if r["method"] == "Network.responseReceived"}
    assert any(url.startswith(server) for url in asked)
    assert [url for url in answered if not url.startswith((server, "data:", "blob:"))] == []
    with socket.socket() as other:  # on no other address of this machine
        with pytest.raises(OSError):
            other.connect(("127.0.0.2", int(server.rpartition(":")[2])))
