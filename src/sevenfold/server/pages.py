"""Pages for people: the chat at `/` and the list of routes at `/docs`; nothing from elsewhere."""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse, Response

from sevenfold.server.service import Service

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def pages_router(service: Service, api: FastAPI) -> APIRouter:
    """Return the pages' routes."""
    router = APIRouter(include_in_schema=False)
    chat = resources.files("sevenfold.server").joinpath("page/chat.html").read_text("utf-8")
    headers = {"Content-Security-Policy": content_security_policy(chat)} | _HEADERS

    @router.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(chat, headers=headers)

    @router.get("/docs")
    async def docs_page() -> Response:
        page = _docs(api.openapi(), service.engine.model_name)
        policy = {"Content-Security-Policy": content_security_policy(page)}
        return HTMLResponse(page, headers=policy | _HEADERS)

    return router


_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def content_security_policy(page: str) -> str:
    """Return a policy that allows a page's own inline script and style, by hash, and no others."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    allowed = [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items() if found]
    rest = ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    trusted = "require-trusted-types-for 'script'"
    parts = ["default-src 'none'", *allowed, "connect-src 'self'", "img-src data:", *rest, trusted]
    return "; ".join(parts)


_DOCS_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
pre { background: #8881; padding: 1rem; overflow: auto; }
code { font-family: ui-monospace, monospace; }
"""


def _docs(openapi: dict[str, Any], model: str) -> str:
    """The routes with what they take and give; the machine's form is /openapi.json."""
    routes = [
        f"<details><summary><code>{method.upper()} {html.escape(path)}</code> "
        f"{html.escape(operation.get('description', ''))}</summary>"
        f"<pre><code>{html.escape(json.dumps(operation, indent=2))}</code></pre></details>"
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [
        f"<details><summary><code>{html.escape(name)}</code> "
        f"{html.escape(schema.get('description', ''))}</summary>"
        f"<pre><code>{html.escape(json.dumps(schema, indent=2))}</code></pre></details>"
        for name, schema in openapi["components"]["schemas"].items()
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sevenfold: routes'
        f"</title><style>{_DOCS_STYLE}</style></head><body><h1>Routes</h1>"
        f"<p>Model: <code>{html.escape(model)}</code>. The same for machines: "
        '<a href="/openapi.json">openapi.json</a>.</p>'
        f"{''.join(routes)}<h2>Bodies</h2>{''.join(schemas)}</body></html>"
    )
