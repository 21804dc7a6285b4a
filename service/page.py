"""The web page, of Gradio's parts: what there is on it, and what its events do. Mounted beside the API by app.py.

Drawing is queue.py's; what a page holds session.py's; its HTML and CSS are markup.py and page.css.
"""

import asyncio
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from starlette.concurrency import run_in_threadpool

from service import markup, uploads
from service.queue import Busy, changes
from service.requests import check_image, pictures_of, sentence, variants
from service.session import Sessions

logger = logging.getLogger("minidalle")

PAUSE = 0.08  # seconds between two looks at a job: more often than the eye needs
VARIED = 0.5  # of a picture's rows stay where it is varied
UNFORESEEN = "Something went wrong inside the program; its log says what."
HEAD = """<meta name="color-scheme" content="light dark">
<meta name="description" content="Text in, pictures out">
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 2 2'
stroke-width='.9' stroke-linecap='round'%3E%3Cpath stroke='%23d6453d' d='M.5 .5h0'/%3E%3Cpath stroke='%233f6fd8'
d='M1.5 .5h0'/%3E%3Cpath stroke='%23e3a72f' d='M.5 1.5h0'/%3E%3Cpath stroke='%23479a5f'
d='M1.5 1.5h0'/%3E%3C/svg%3E">"""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")


def theme():
    ink = {
        "button_primary_background_fill": "*neutral_900",
        "button_primary_background_fill_hover": "*neutral_700",
        "button_primary_background_fill_dark": "*neutral_100",
        "button_primary_background_fill_hover_dark": "*neutral_300",
        "button_primary_text_color": "white",
        "button_primary_text_color_dark": "*neutral_900",
        "body_background_fill": "*neutral_50",
        "block_border_width": "0px",
        "block_shadow": "none",
        "slider_color": "*neutral_700",
        "slider_color_dark": "*neutral_300",
        "input_background_fill": "white",
    }
    colours = {"primary_hue": "zinc", "secondary_hue": "zinc", "neutral_hue": "zinc"}
    sizes = {"radius_size": "lg", "text_size": "md"}
    return gr.themes.Base(**colours, **sizes, font=list(FONTS), font_mono=["ui-monospace", "monospace"]).set(**ink)


def mount(app, loaded, queue, limits):
    """Put the page at / of a FastAPI application."""
    blocks = build(loaded, queue, limits)
    options = {"footer_links": [], "run_history": False, "show_error": True, "ssr_mode": False, "mcp_server": False}
    options.update(max_file_size=uploads.MAX_BYTES, enable_monitoring=False, pwa=False)
    style = Path(__file__).with_name("page.css")
    gr.mount_gradio_app(app, blocks, "/", theme=theme(), css_paths=[style], head=HEAD, **options)


def build(loaded, queue, limits):
    """gr.Blocks of the page with its events."""
    sessions = Sessions()
    with gr.Blocks(title="Mini DALL-E", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
        parts = layout(loaded, limits)
        wire(blocks, parts, Events(loaded, queue, limits, sessions, parts))
    return blocks


def layout(loaded, limits):
    """Everything that is seen, in its places → the parts that events concern."""
    bare("<header><h1>Mini DALL-E</h1><p>Text in, pictures out</p></header>")
    with gr.Row(elem_id="ask"):
        prompt = gr.Textbox(
            placeholder="What should the picture show?",
            label="Prompt",
            show_label=False,
            container=False,
            lines=1,
            max_lines=4,
            autofocus=True,
            elem_id="prompt",
            scale=5,
        )
        draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=0, min_width=120)
        stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=120, visible=False)
    with gr.Row(elem_id="desk"):
        with gr.Column(scale=3, min_width=320):
            status = bare("", elem_id="status")
            grid = bare(markup.NOTHING, elem_id="grid", js_on_load=markup.CLICKS)
            chosen = bare("", elem_id="chosen", js_on_load=markup.CHOSEN)
            history = bare("", elem_id="history", js_on_load=markup.CLICKS)
        with gr.Column(scale=1, min_width=280, elem_id="controls"):
            with gr.Accordion("Settings", open=True):
                count = gr.Slider(1, limits.max_images, min(4, limits.max_images), step=1, label="Pictures")
                shaping = sampling_sliders(loaded)
                seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, elem_id="seed")
            with gr.Accordion("Begin from a picture", open=False, elem_id="image-prompt"):
                bare('<p class="hint">Its upper rows stay, the rest is drawn.</p>')
                image = gr.Image(
                    label="Picture",
                    show_label=False,
                    sources=["upload", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=200,
                    buttons=[],
                    elem_id="image",
                )
                image.preprocess = path_of  # else Gradio opens the picture itself, with errors of its own
                rows = loaded.side
                keep = gr.Slider(1, max(rows - 1, 2), max(rows // 2, 1), step=1, label=f"Rows kept, of {rows}")
    bare(f'<footer>Checkpoint {loaded.fingerprint[:8]} · <a href="docs">HTTP API</a></footer>')
    asked = {"prompt": prompt, "count": count, "seed": seed, "image": image, "keep": keep, "shaping": shaping}
    seen = {"status": status, "grid": grid, "chosen": chosen, "history": history, "draw": draw, "stop": stop}
    return SimpleNamespace(**asked, **seen)


def bare(value, **options):
    """gr.HTML without Gradio's own style of text."""
    return gr.HTML(value, apply_default_css=False, **options)


def path_of(upload):
    """What gr.Image sends → the file's path, or None; uploads.py looks at it, with limits."""
    return upload.path if upload else None


def sampling_sliders(loaded):
    """A slider each for temperature, top_k, top_p and cond_scale, at what the checkpoint recommends."""
    at = loaded.recommended
    temperature = gr.Slider(
        *(min(0.1, at["temperature"]), max(2, at["temperature"]), at["temperature"]),
        step=0.05,
        label="Temperature",
        info="from safe to wild",
    )
    if at["top_k"] is not None and at["top_k"] > 1:
        codes = loaded.model.num_image_tokens
        top_k = gr.Slider(2, codes, at["top_k"], step=1, label="Top-k", info="codes kept")
    else:
        top_k = gr.Slider(0, 1, at["top_k"] or 0, step=0.005, label="Top-k", info="share of codes cut")
    top_p = gr.Slider(
        *(0.01, 1, 1 if at["top_p"] is None else at["top_p"]), step=0.01, label="Top-p", info="likeliest codes kept"
    )
    cond_scale = gr.Slider(
        *(min(1, at["cond_scale"]), max(10, at["cond_scale"]), at["cond_scale"]),
        step=0.25,
        label="Guidance",
        info="1 is none",
        visible=loaded.guidable,
    )
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}


def wire(blocks, parts, events):
    """Which event calls what. Gradio's own queue lets everything through: who draws next is ours to say."""
    asked = [parts.prompt, parts.count, parts.seed, parts.image, parts.keep, *parts.shaping.values()]
    seen = [parts.status, parts.grid, parts.chosen, parts.history, parts.draw, parts.stop]
    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    gr.on([parts.prompt.submit, parts.draw.click], events.draw, asked, seen, **quiet)
    parts.chosen.click(events.vary, [parts.count], seen, **quiet)
    parts.stop.click(events.stop, None, None, **quiet)
    parts.grid.select(events.choose_shown, None, seen, **quiet)
    parts.history.select(events.choose_old, None, seen, **quiet)
    parts.image.upload(events.check, [parts.image], [parts.status, parts.image], **quiet)
    blocks.unload(events.leave)


def seed_of(text):
    """What was written as a seed → int, or None. ValueError with a sentence."""
    text = (text or "").strip()
    if text and not (text.isdecimal() and len(text) < 20):
        raise ValueError(f"The seed is '{text[:40]}'; it must be a whole number from 0 on, or be left out.")
    return int(text) if text else None


class Events:
    """What happens when something is pressed. Each method gives updates of the parts that change."""

    def __init__(self, loaded, queue, limits, sessions, parts):
        self.loaded, self.queue, self.limits, self.sessions, self.parts = loaded, queue, limits, sessions, parts
        self.at_first = {key: slider.value for key, slider in parts.shaping.items()}

    async def draw(self, prompt, count, seed, image, keep, temperature, top_k, top_p, cond_scale, request: gr.Request):
        moved = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
        sampling = {key: value for key, value in moved.items() if value != self.at_first[key]}
        wanted = {"prompt": prompt or "", "count": count, "sampling": sampling, "image": image, "keep": keep}

        def make():
            return pictures_of(self.loaded, self.limits, **wanted, seed=seed_of(seed))

        async for update in self._drawing(request.session_hash, make):
            yield update

    async def vary(self, count, request: gr.Request):
        finished = self.sessions.of(request.session_hash).chosen
        if finished is None:
            return
        side = self.loaded.side
        given = finished.codes[: max(1, int(side * VARIED)) * side]
        wanted = {"prompt": finished.picture.prompt, "count": count, "sampling": finished.picture.sampling}

        def make():
            return variants(self.loaded, self.limits, **wanted, given=given)

        async for update in self._drawing(request.session_hash, make):
            yield update

    async def _drawing(self, page, make):
        """Updates while pictures are drawn; make() → what is to be drawn, in a thread."""
        session, parts = self.sessions.of(page), self.parts
        job = None
        try:
            show, hide = gr.update(visible=True), gr.update(visible=False)
            yield {parts.status: markup.said("Starting …", 0), parts.draw: hide, parts.stop: show}
            pictures = await run_in_threadpool(make)
            began = time.monotonic()
            job = self.queue.submit(("page", page), pictures, every=1)
            before = session.begin(job)
            if before is not None:
                self.queue.cancel(before)
            async for _ in changes(job):
                if session.job is not job:
                    return
                await run_in_threadpool(session.take, self.loaded, job)
                if not job.ended.is_set():
                    status = markup.progress(job, self.queue.others(job), self.loaded.side)
                    yield {parts.status: status, **self._pictures(session, job)}
                    await asyncio.sleep(PAUSE)
            ending = markup.ended(job, time.monotonic() - began)
        except (ValueError, Busy) as error:
            ending = markup.wrong(str(error))
        except Exception:
            logger.exception("the page could not draw")
            ending = markup.wrong(UNFORESEEN)
        finally:
            if job is not None:
                self.queue.cancel(job)  # does nothing where it has ended
        yield {
            parts.status: ending,
            **self._pictures(session, None),
            parts.history: markup.history(session),
            parts.draw: gr.update(visible=True),
            parts.stop: gr.update(visible=False),
        }

    def _pictures(self, session, job):
        parts = self.parts
        return {
            parts.grid: markup.grid(session, job),
            parts.chosen: markup.chosen(session.chosen),
        }

    async def stop(self, request: gr.Request):
        job = self.sessions.of(request.session_hash).job
        if job is not None:
            self.queue.cancel(job)

    async def choose_shown(self, event: gr.EventData, request: gr.Request):
        session = self.sessions.of(request.session_hash)
        return self._choose(session, session.shown, event)

    async def choose_old(self, event: gr.EventData, request: gr.Request):
        session = self.sessions.of(request.session_hash)
        return self._choose(session, list(session.history), event)

    def _choose(self, session, among, event):
        place = event._data.get("place") if isinstance(event._data, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(among) or among[place] is None:
            return {}
        session.chosen = among[place]
        return self._pictures(session, session.job)

    def check(self, image):
        """An upload that cannot be used is told and taken away at once."""
        try:
            check_image(image)
        except (ValueError, OSError) as error:
            return {self.parts.status: markup.wrong(sentence(str(error))), self.parts.image: None}
        return {self.parts.status: markup.said("The upper rows of that picture will stay.")}

    def leave(self, request: gr.Request):
        """The page was closed: what it waited for need not be drawn."""
        session = self.sessions.closed(request.session_hash)
        if session is not None and session.job is not None:
            self.queue.cancel(session.job)
