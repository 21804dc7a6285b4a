"""The page in a real browser: Chromium without a window, driven by selenium. Skipped where there is none.

BROWSER_SHOTS=FOLDER keeps screenshots there; DALLE_PATH=FILE takes another checkpoint than the demo.
"""

import base64
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from generation.loading import DEMO
from tests.service.running import Drawing, call, generate, loaded_for_tests, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"
PROMPT = "a red circle"
DESK, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    demo = DEMO if DEMO.exists() else tiny_checkpoint
    return loaded_for_tests(os.environ.get("DALLE_PATH", demo), batch_size=4)


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded, "--max-images", 8, "--max-prompt-characters", 100) as port:
        yield port


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def drawing(loaded):
    drawing = Drawing(loaded)
    yield drawing
    drawing.remove()


@pytest.fixture
def shots(tmp_path):
    folder = Path(os.environ.get("BROWSER_SHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Page:
    """The page, newly opened, and what a person does on it."""

    def __init__(self, browser, port, shots, size=DESK, dark=False):
        self.browser, self.shots = browser, shots
        phone = size == PHONE
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(f"http://127.0.0.1:{port}/")
        until(lambda: self.all("#prompt textarea, #prompt input"))
        time.sleep(0.3)  # until Gradio has bound its events

    def all(self, css):
        return [one for one in self.browser.find_elements("css selector", css) if one.is_displayed()]

    def text(self, css):
        """What is written there; nothing where it is just being replaced."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join(' ')"
        return self.browser.execute_script(script, css)

    def ask(self, prompt):
        box = self.all("#prompt textarea, #prompt input")[0]
        box.clear()
        box.send_keys(prompt + "\ue007")  # Enter

    def said(self, words):
        until(lambda: words in self.text("#status"))

    def drawn(self, count=4):
        self.said("seconds. Choose one")
        until(lambda: len(self.all("#grid button.tile img")) == count)

    def click(self, css, place=0):
        until(lambda: len(self.all(css)) > place)
        self.browser.execute_script("arguments[0].click()", self.all(css)[place])

    def upload(self, path):
        if not self.browser.find_elements("css selector", "#image input[type=file]") or not self.all("#image"):
            self.click("#image-prompt button")
        until(lambda: self.browser.find_elements("css selector", "#image input[type=file]"))
        self.browser.find_element("css selector", "#image input[type=file]").send_keys(str(path))

    def chosen(self):
        """(facts of the picture that was clicked, the bytes of the file that its link saves, their name)."""
        until(lambda: self.all(".chosen a"))
        link = self.all(".chosen a")[0]
        data = base64.b64decode(link.get_attribute("href").partition("base64,")[2])
        names = self.browser.execute_script("return [...document.querySelectorAll('.chosen dt')].map(e => e.innerText)")
        values = self.browser.execute_script(
            "return [...document.querySelectorAll('.chosen dd')].map(e => e.innerText)"
        )
        return dict(zip(names, values)), data, link.get_attribute("download")

    def shoot(self, name):
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))

    def whole(self, name):
        """A screenshot of everything, as high as it is."""
        options = {"captureBeyondViewport": True, "format": "png"}
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        (self.shots / f"{name}.png").write_bytes(base64.b64decode(shot))


@pytest.fixture
def page(chromium, port, shots):
    chromium.get_log("browser")
    page = Page(chromium, port, shots)
    yield page
    severe = [line["message"] for line in chromium.get_log("browser") if line["level"] == "SEVERE"]
    assert severe == []


def test_a_prompt_forms_row_by_row_and_can_be_saved_and_varied(page, port, drawing, loaded):
    page.shoot("empty")
    drawing.seconds = 0.15 if loaded.model.fmap_size < 8 else 0.04
    page.ask("a small red circle above a large blue square")
    until(lambda: page.all("#grid .forming img"))
    rows = loaded.model.fmap_size
    assert f"of {rows}" in page.text("#status") and page.all("#stop") and not page.all("#draw")
    page.shoot("forming")
    assert not page.all("#grid button.tile")
    page.drawn()
    assert page.all("#draw") and not page.all("#stop")
    page.shoot("drawn")

    drawing.seconds = 0
    page.click("#grid button.tile", 2)
    facts, png, name = page.chosen()
    about = json.loads(Image.open(io.BytesIO(png)).info["Comment"])
    assert str(about["seed"]) == facts["Seed"] and name == f"mini-dalle-seed-{facts['Seed']}.png"
    answer = generate(port, prompt="a small red circle above a large blue square", seed=about["seed"])[1]
    assert base64.b64decode(answer["pictures"][0]["png"]) == png
    assert page.all('#grid [aria-pressed="true"]')
    page.whole("chosen")

    page.click(".chosen .vary")
    until(lambda: len(page.all("#history .tile")) == 8)
    page.drawn()
    page.click("#grid button.tile")
    facts, png, _ = page.chosen()
    assert facts["Rows kept"] == str(rows // 2)
    parent, child = (Image.open(io.BytesIO(one)).info["Comment"] for one in (base64_png(answer), png))
    assert json.loads(child)["prompt"] == json.loads(parent)["prompt"]
    page.whole("varied")
    page.click("#history .tile", 7)  # the first one of all
    until(lambda: "Rows kept" not in page.text(".chosen"))


def base64_png(answer):
    return base64.b64decode(answer["pictures"][0]["png"])


def test_an_uploaded_picture_is_continued(page, drawn_pictures, loaded):
    page.upload(sorted(drawn_pictures.glob("*.png"))[0])
    until(lambda: page.all("#image img"))
    page.ask(PROMPT)
    page.drawn()
    page.click("#grid button.tile")
    assert page.chosen()[0]["Rows kept"] == str(loaded.model.fmap_size // 2)
    page.whole("image_prompt")


def test_stop_stops_the_drawing(page, port, drawing):
    before = call(port)[1]["pictures_drawn"]
    drawing.seconds = 0.1
    page.ask(PROMPT)
    until(lambda: "row" in page.text("#status"))
    page.click("#stop")
    page.said("Stopped.")
    until(lambda: page.all("#draw"))
    page.shoot("stopped")
    about = call(port)[1]
    assert about["waiting"] == 0 and about["pictures_drawn"] == before
    drawing.seconds = 0
    page.ask(PROMPT)
    page.drawn()


def test_closing_the_page_stops_the_drawing(chromium, port, drawing, shots):
    page = Page(chromium, port, shots)
    drawing.seconds = 0.1
    page.ask(PROMPT)
    drawing.began(1)
    assert call(port)[1]["waiting"] == 1
    page.browser.get("about:blank")
    until(lambda: call(port)[1]["waiting"] == 0)
    assert drawing.codes < 16


def test_what_is_wrong_is_said_in_a_sentence(page, tmp_path):
    page.ask("   ")
    page.said("The prompt is empty; write what the picture should show.")
    page.ask("x" * 101)
    page.said("The prompt has 101 characters; at most 100 are accepted.")
    page.shoot("wrong_prompt")
    Image.new("1", (10_000, 5_000)).save(tmp_path / "large.png")
    page.upload(tmp_path / "large.png")
    page.said("The picture is 10000 × 5000 pixels, 50.0 megapixels; at most 24 are accepted.")
    page.shoot("wrong_upload")
    assert not page.all("#image img")
    (tmp_path / "no.png").write_bytes(b"<html></html>")
    page.upload(tmp_path / "no.png")
    page.said("The file is no picture that can be read")
    page.ask(PROMPT)
    page.drawn()
    assert "Traceback" not in page.browser.page_source


def test_a_wrong_seed_is_said_and_a_right_one_repeats(page, port):
    seed = page.all("#seed input, #seed textarea")[0]
    seed.send_keys("seven")
    page.ask(PROMPT)
    page.said("The seed is 'seven'; it must be a whole number from 0 on, or be left out.")
    seed.clear()
    seed.send_keys("7")
    page.ask(PROMPT)
    page.drawn()
    page.click("#grid button.tile", 1)
    facts, png, _ = page.chosen()
    assert facts["Seed"] == "8"
    assert png == base64_png(generate(port, prompt=PROMPT, seed=8)[1])


def test_what_somebody_writes_stays_text(page):
    prompt = "<b>${1}{{a}}`</b>"
    page.ask(prompt)
    page.drawn()
    page.click("#grid button.tile")
    page.chosen()
    assert page.text(".chosen .prompt") == prompt and not page.all(".chosen b")


@pytest.mark.parametrize("size, dark", [(DESK, True), (PHONE, False), (PHONE, True)])
def test_it_fits_a_phone_and_the_dark(chromium, port, shots, drawn_pictures, size, dark):
    page = Page(chromium, port, shots, size, dark)
    page.ask("a small red circle above a large blue square")
    page.drawn()
    page.click("#grid button.tile")
    page.chosen()
    page.upload(sorted(drawn_pictures.glob("*.png"))[0])
    until(lambda: page.all("#image img"))
    name = f"{'phone' if size == PHONE else 'desk'}_{'dark' if dark else 'light'}"
    time.sleep(0.4)
    page.shoot(name)
    page.whole(f"{name}_whole")
    script = "return document.documentElement.scrollWidth"
    assert chromium.execute_script(script) <= size[0]
    colours = "return [document.body, document.querySelector('#prompt textarea, #prompt input')]"
    colours += ".map(e => getComputedStyle(e).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number))"
    for colour in chromium.execute_script(colours):
        assert max(colour) < 70 if dark else min(colour) > 230
    tile = chromium.execute_script("return document.querySelector('#grid .tile').getBoundingClientRect().width")
    assert tile > 120  # a thumb's width, at least


def test_nothing_is_asked_of_the_network(page):
    page.ask(PROMPT)
    page.drawn()
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    here = page.browser.current_url
    assert names and [name for name in names if not name.startswith((here, "data:", "blob:"))] == []
