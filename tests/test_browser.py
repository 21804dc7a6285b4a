"""The page in a real browser: headless Chromium, driven by selenium. Skipped if there is none."""

import base64
import importlib.util
import io
import json
import shutil
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import SHAPES
from tests.service.running import answer_to, call, generate, loaded_for_tests, running, until

pytest.importorskip("uvicorn")
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = map(shutil.which, ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
PROMPT = "a small red circle above a large blue square"
DESK, PHONE = (1280, 900), (390, 844)
HACK = "<img src=x onerror=hacked()>"
SCRIPT = Path(__file__).with_name("browser.js")


@pytest.fixture(scope="module")
def loaded():
    return loaded_for_tests(SHAPES, batch_size=4)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SCRIPT.read_text()})
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", grant)
    yield browser
    browser.quit()


class Page:
    """The page, and what a person does on it."""

    def __init__(self, browser, port):
        self.browser, self.address = browser, f"http://127.0.0.1:{port}/"
        self.resize(DESK)
        data = {"origin": self.address.rstrip("/"), "storageTypes": "all"}
        browser.execute_cdp_cmd("Storage.clearDataForOrigin", data)
        self.open()

    def open(self, address=None):
        self.browser.get(address or self.address)
        until(lambda: self.js("document.querySelector('#keep_rows').max") or self.shows("#retry"))

    def resize(self, size, dark=False):
        phone = size == PHONE
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, motion]})

    def js(self, expression, *values):
        return self.browser.execute_script(f"return {expression}", *values)

    def each(self, css, expression):
        """Return the values of a JavaScript expression for each visible element e."""
        visible = "[...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
        return self.js(f"{visible}.map((e) => {expression})", css)

    def text(self, css):
        return " ".join(self.each(css, "e.innerText"))

    def shows(self, css):
        return len(self.each(css, "0"))

    def click(self, css, place=0):
        until(lambda: self.shows(css) > place)
        self.js("[...document.querySelectorAll(arguments[0])][arguments[1]].click()", css, place)

    def write(self, text, css="#prompt"):
        box = self.browser.find_element("css selector", css)
        box.clear()
        box.send_keys(text)

    def press(self, key):
        webdriver.ActionChains(self.browser).send_keys(getattr(webdriver.Keys, key)).perform()

    def generate(self, prompt=PROMPT, count=4):
        self.each("#status", "(e.textContent = '')")
        self.write(prompt + webdriver.Keys.ENTER)
        self.finished(count)

    def finished(self, count=4):
        until(lambda: " seconds." in self.text("#status") and self.shows("#grid button.cell img") == count)

    def drop(self, name, content):
        """Drop a file of this name on the page."""
        self.js("drop(...arguments)", name, base64.b64encode(content).decode())

    def facts(self):
        """Return what the large view says of its image."""
        return dict(zip(self.each("#facts dt", "e.innerText"), self.each("#facts dd", "e.innerText")))

    def png(self):
        """Return the bytes of the image in the large view, from the history."""
        seed = self.facts()["Seed"]
        return bytes(self.browser.execute_async_script("bytesOf(...arguments)", self.text("#caption"), seed))


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded) as port:
        yield port


@pytest.fixture
def page(chromium, port):
    page = Page(chromium, port)
    yield page
    assert page.js("window.violations ?? []") == []


def test_a_prompt_becomes_images_row_by_row(page, loaded, drawing):
    assert page.shows("#examples button") == len(loaded.examples)
    page.click("#examples button")
    page.finished()
    assert page.text("#grid h2") == loaded.examples[0]

    page.browser.execute_script("announced.length = 0")
    drawing.seconds = 0.02
    page.write("a red circle" + webdriver.Keys.ENTER)
    until(lambda: page.shows("#stop") and page.shows("#grid .cell") == 4)
    places = ("#grid .cell, #settings", "JSON.stringify(e.getBoundingClientRect())")
    before, heights, left = page.each(*places), [], ""
    while page.shows("#stop"):
        heights += page.each("#grid .cell:not(button):first-child img", "e.clientHeight")
        left = page.text("#left") or left
    page.finished()
    assert heights == sorted(heights) and len(set(heights)) >= 3
    assert left.startswith("About ") and page.each(*places) == before
    start, end = page.js("announced")
    assert start == "Generating 4 images. " and end.startswith("4 images in ")


def test_stop_and_leaving_the_page_cancel_the_job(page, port, drawing):
    page.browser.execute_script("breakFirst()")
    page.generate()
    drawing.seconds = 0.1
    page.write(PROMPT + webdriver.Keys.ENTER)
    until(lambda: call(port)[1]["waiting"] == 1 and page.js("jobs.length") > 2)
    answer_to(port, "DELETE", page.js("jobs.at(-1)"))
    until(lambda: "the server cancelled the rest" in page.text("#status"))
    page.write(PROMPT + webdriver.Keys.ENTER)
    until(lambda: page.js("document.querySelector('#progress').value > 0.1"))
    page.click("#stop")
    until(lambda: page.text("#status") == "Stopped; 0 of 4 images finished." and call(port)[1]["waiting"] == 0)
    page.write("a red circle" + webdriver.Keys.ENTER)
    until(lambda: call(port)[1]["waiting"] == 1)
    page.browser.get("about:blank")
    until(lambda: call(port)[1]["waiting"] == 0, 8)
    drawing.seconds = 0
    page.open()


def test_the_large_view_shows_reuses_and_copies(page, port, loaded, monkeypatch):
    monkeypatch.setattr(loaded, "recommended", loaded.recommended._replace(top_p=None))
    page.open()
    page.generate()
    page.click("#grid button.cell")
    assert page.text("#place") == "Image 1 of 4" and page.text("#caption") == PROMPT
    png = page.png()
    about, facts = json.loads(Image.open(io.BytesIO(png)).info["Comment"]), page.facts()
    assert facts["Seed"] == str(about["seed"]) and facts["Temperature"] == str(about["temperature"])
    assert base64.b64decode(generate(port, prompt=PROMPT, seed=about["seed"])[1]["images"][0]["png"]) == png
    assert page.each("#download", "e.download")[0] == f"mini-dalle-seed-{about['seed']}.png"

    seeds = []
    for key in ("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT"):
        page.press(key)
        seeds.append(int(page.facts()["Seed"]) - about["seed"])
    assert seeds == [1, 2, 1, 0, 3]
    page.press("ESCAPE")
    until(lambda: not page.shows("#viewer"))

    page.write("a red circle")
    page.each("#top_p", "[e.value = 0.9, e.oninput()]")
    page.click("#history .cell", 1)
    page.js("document.querySelector('#ask').requestSubmit()")
    until(lambda: page.shows("#history .cell") == 8)  # the large view stays at its image
    page.click("#reuse")
    assert page.each("#prompt, #top_p", "e.value") == [PROMPT, "1"]
    assert page.each("#seed", "e.value")[0] == str(about["seed"] + 2) and not page.shows("#viewer")


def test_vary_and_continue_keep_the_upper_rows(page, loaded):
    page.generate()
    page.click("#grid button.cell", 1)
    parent = page.png()
    page.click("#vary")
    until(lambda: page.shows("#history .cell") == 8)
    page.finished()
    page.click("#grid button.cell")
    half = -(-loaded.side // 2)
    assert page.facts()["Rows kept"] == str(half)
    assert json.loads(Image.open(io.BytesIO(page.png())).info["Comment"])["prompt"] == PROMPT
    assert not page.shows("#copy_link")
    page.click("#resume")
    assert page.shows("#start") and page.shows("#keep_rows")
    page.click("#remove")
    assert not page.shows("#start") and not page.shows("#keep_rows")

    page.drop("mine.png", parent)
    until(lambda: page.js("document.querySelector('#start').naturalWidth > 0"))
    page.each("#keep_rows", "[e.value = 2, e.oninput()]")
    page.generate("a red circle")
    page.click("#grid button.cell", 3)
    assert page.facts()["Rows kept"] == "2"


def test_history_survives_a_reload_and_a_restart_of_the_server(chromium, loaded):
    with running(loaded) as port:
        page = Page(chromium, port)
        page.generate()
        page.click("#history .cell", 3)
        png = page.png()
        page.open()
        until(lambda: page.shows("#history .cell") == 4)
        page.click("#history .cell", 3)
        assert page.png() == png and page.text("#caption") == PROMPT
        page.press("ESCAPE")
    page.write("a red circle" + webdriver.Keys.ENTER)
    until(lambda: page.text("#status") == "The server does not answer.")
    with running(loaded, port=port):
        page.click("#retry")
        page.finished()
        page.open()
        until(lambda: page.shows("#history .cell") == 8)


def test_a_token_is_asked_for_once(chromium, loaded):
    with running(loaded, "--token", "sesame") as port:
        page = Page(chromium, port)
        for token in ("wrong", "“sésame”", "sesame"):
            until(lambda: page.shows("#login"))
            page.write(token + webdriver.Keys.ENTER, "#token")
            until(lambda: page.js("document.querySelector('#token').value === ''"))
        until(lambda: not page.shows("#login"))
        page.open()
        page.generate()
        assert not page.shows("#login") and page.js("violations") == []


def test_a_link_reproduces_an_image(page):
    page.each("#temperature", "[e.value = 0.5, e.oninput()]")
    page.generate("a red & blue “square”")
    page.click("#grid button.cell", 2)
    png = page.png()
    page.click("#copy_link")
    until(lambda: page.text("#copied") == "Link copied.")
    link = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert "temperature=0.5" in link
    page.open(link)
    page.finished(1)
    assert page.browser.current_url == page.address
    page.click("#grid button.cell")
    assert page.png() == png
    page.open(f"{page.address}?prompt=a+red+circle&seed=1&temperature=wild")
    page.finished(1)
    assert "NaN" not in page.text("#settings") and page.js("violations") == []


def test_nothing_that_others_write_becomes_markup(page, loaded, monkeypatch):
    monkeypatch.setattr(loaded, "path", f"{HACK}.safetensors")
    monkeypatch.setattr(loaded, "examples", [HACK])
    page.open()
    assert page.text("#about") == page.text("#examples") + ".safetensors" == f"{HACK}.safetensors"
    page.drop(f"{HACK}.png", b"<svg onload=hacked()>")
    until(lambda: page.text("#status") == f"{HACK}.png is not an image that this browser can read.")
    page.generate(f"a red circle {HACK[:10]}")
    page.click("#grid button.cell")
    assert page.facts()["Checkpoint"] == f"{HACK}.safetensors"
    page.press("ESCAPE")
    query = {"prompt": HACK, "seed": f'"><script>hacked()</script>{HACK}', "temperature": HACK}
    page.open(page.address + "?" + "&".join(f"{key}={urllib.request.quote(value)}" for key, value in query.items()))
    until(lambda: "hacked" in page.each("#seed", "e.value")[0])
    page.browser.execute_async_script("addImageOf(...arguments)", HACK)
    page.open()
    page.click("#history .cell")
    assert page.text("#caption") == page.facts()["Seed"] == HACK
    page.click("#reuse")
    assert page.each("#prompt", "e.value")[0] == HACK


@pytest.mark.parametrize("size, dark", [(DESK, False), (PHONE, True)])
def test_axe_finds_nothing_on_a_desktop_and_a_phone(page, drawing, size, dark):
    page.resize(size, dark)
    page.open()
    spec = importlib.util.find_spec("axe_core_python") or pytest.skip("axe-core-python is not installed")
    page.browser.execute_script(Path(spec.submodule_search_locations[0], "axe.min.js").read_text())

    def check(state):
        found = page.browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], state
        assert page.js("document.documentElement.scrollWidth") <= size[0]

    check("empty")
    drawing.seconds = 0.01
    page.write("a small red dog above a large blue square")
    page.js("document.querySelector('#ask').requestSubmit()")
    until(lambda: page.shows("#grid .cell img") == 4 and page.js("document.querySelector('#progress').value") > 0.4)
    drawing.hold()
    check("during")
    drawing.release()
    page.finished()
    check("after")
    results, settings, history = page.each("#results, #settings, #history", "e.getBoundingClientRect().top")
    assert results < settings < history if size == PHONE else results == settings < history
    page.click("#grid button.cell")
    check("large")
