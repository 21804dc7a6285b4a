"""The page that GET /docs shows: the API's JSON form, written from the class that checks it. No script, no network."""

import html

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mini DALL-E: HTTP API</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ padding: .8rem 1rem; border: 1px solid #8886; border-radius: 8px; overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #8884; }}
</style></head><body>
<h1>HTTP API</h1>
<p><b>GET /health</b> says whether the service draws, which checkpoint it has, and how many requests wait.</p>
<p><b>POST /api/generate</b> takes a JSON object (<code>Content-Type: application/json</code>) with these keys; all but
<code>prompt</code> may be left out.</p>
<table><tr><th>key</th><th>type</th><th>meaning</th></tr>{rows}</table>
<p>At most {images} pictures a request, {characters} characters a prompt and {megabytes} MB a picture. Settings that are
left out are those that the checkpoint recommends: {recommended}.</p>
<pre>curl -H "Content-Type: application/json" \\
     -d '{{"prompt": "a small red circle above a large blue square", "count": 2, "seed": 7}}' \\
     http://127.0.0.1:7860/api/generate</pre>
<p>The answer:</p>
<pre>{{"pictures": [{{"png": "&lt;base64&gt;", "seed": 7, "metadata": {{"prompt": …, "seed": 7, "top_k": …}}}}, …],
 "seconds": 1.3}}</pre>
<p>The same seed gives the same picture, whatever else is drawn at the same time (with bf16, a rounding may rarely
change it). A request that cannot be served gets a 4xx or, where the queue is full, 503, and
<code>{{"error": "a sentence"}}</code>. A client that closes its connection takes its request back.</p>
</body></html>"""
TYPES = {"string": "text", "integer": "whole number", "number": "number"}


def page_of(model, loaded, limits):
    """HTML of the keys of a pydantic model, and of the limits that hold."""
    from service.uploads import MAX_BYTES

    rows = ""
    for name, about in model.model_json_schema()["properties"].items():
        kind = about.get("type") or about["anyOf"][0]["type"]
        rows += (
            f"<tr><td><code>{name}</code></td><td>{TYPES[kind]}</td><td>{html.escape(about['description'])}</td></tr>"
        )
    recommended = ", ".join(
        f"{name} {'none' if value is None else value}" for name, value in loaded.recommended._asdict().items()
    )
    return PAGE.format(
        rows=rows,
        images=limits.max_images,
        characters=limits.max_prompt_characters,
        megabytes=MAX_BYTES // 2**20,
        recommended=html.escape(recommended),
    )
