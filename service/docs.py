"""The page GET /docs: FastAPI's OpenAPI document as HTML, without script and without other hosts."""

import html
import json
from typing import Any, Dict

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: HTTP API</title><link rel="stylesheet" href="static/style.css"></head><body class="docs"><main>
<h1>{title}: HTTP API</h1>
<p>Written from <a href="openapi.json">openapi.json</a>. Each error is <code>{{"error": "one sentence"}}</code>.</p>
{routes}</main></body></html>"""


def render(document: Dict[str, Any]) -> str:
    """Return the HTML of an OpenAPI document."""
    schemas, routes = document["components"]["schemas"], []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            routes.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['description'])}</p>"
            )
            fields = {one["name"]: one["schema"] for one in operation.get("parameters", ())}
            fields.update(fields_of(operation.get("requestBody", {}), schemas))
            routes.append(table("Request", fields))
            for status, answer in sorted(operation["responses"].items()):
                if status.startswith("2"):
                    routes.append(table(f"Answer {status}", fields_of(answer, schemas)))
    return PAGE.format(title=html.escape(document["info"]["title"]), routes="\n".join(routes))


def fields_of(body: Dict[str, Any], schemas: Dict[str, Any]) -> Dict[str, Any]:
    """Return the properties of a request's or an answer's JSON."""
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    return schemas.get(schema.get("$ref", "").rpartition("/")[2], {}).get("properties", {})


def table(title: str, fields: Dict[str, Any]) -> str:
    """Return the HTML of a table of fields, or nothing if there are none."""
    rows = ""
    for name, field in fields.items():
        kinds = [one.get("type") or one.get("$ref", "any").rpartition("/")[2] for one in field.get("anyOf", [field])]
        about = field.get("description", "")
        if "default" in field and field["default"] is not None:
            about += f" (default {json.dumps(field['default'])})"
        rows += f"<tr><td><code>{name}</code></td><td>{' or '.join(kinds)}</td><td>{html.escape(about)}</td></tr>"
    return rows and f"<table><caption>{title}</caption><tr><th>key</th><th>type</th><th>meaning</th></tr>{rows}</table>"
