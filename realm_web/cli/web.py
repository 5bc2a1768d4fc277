"""Serve the page, and one model file with it, on this machine only. Nothing is fetched from elsewhere.

The page asks /server.json which model is offered: {"model": {"name": ..., "url": ..., "size": bytes}} or
{"model": null}.
"""

import argparse
import json
import threading
import webbrowser
from pathlib import Path
from urllib.parse import quote

from realm_web.cli import model
from realm_web.cli.static import Site, server
from realm_web.errors import RequestError

EXAMPLES = """examples:
  realm web                      the page with the default model, on http://localhost:8000
  realm web model.gguf --open    offer this file, and open a browser
  realm web --port 0 --no-model  any free port, no model"""

CHECKOUT_SITE = Path(__file__).resolve().parents[2] / "web"
ASSEMBLE = "python web/build_site.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    offered = parser.add_mutually_exclusive_group()
    offered.add_argument(
        "model", metavar="MODEL", nargs="?", help="the .gguf file to offer (default: the demo)"
    )
    offered.add_argument("--no-model", action="store_true", help="offer no model")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any free (default: %(default)s)"
    )
    parser.add_argument("--site", type=Path, default=CHECKOUT_SITE, metavar="DIR", help="folder of the page")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--verbose", action="store_true", help="log every request")


def main(args: argparse.Namespace) -> int:
    from realm_web.cli.terminal import note

    site = build_site(args.site, None if args.no_model else offered_model(args.model))
    with server(site, args.port, quiet=not args.verbose) as http:
        address = f"http://localhost:{http.server_port}/"
        if not site.extra:
            note("no model is offered; open a file or a URL in the page")
        print(f"{address} (Ctrl-C ends)", flush=True)
        if args.open:
            threading.Timer(0.2, webbrowser.open, [address]).start()
        http.serve_forever()
    return 0


def offered_model(name: str | None) -> Path | None:
    """The file to offer: the one named, else the default one if there is any."""
    if name is None:
        try:
            name = model.model_or_default(None)
        except RequestError:
            return None
    path = Path(name)
    if not path.is_file():
        raise RequestError(
            f"{name}: no such file; `realm web` offers local files, URLs are opened in the page"
        )
    return path


def build_site(folder: Path, offered: Path | None) -> Site:
    """The site in `folder` with `offered` under /models/; RequestError when page or assets are missing."""
    if not (folder / "index.html").is_file():
        raise RequestError(
            f"{folder}: no index.html there; `realm web` needs the web folder of the source, --site DIR"
        )
    if not (folder / "assets" / "pyodide.mjs").is_file():
        raise RequestError(f"{folder / 'assets'}: not assembled yet; run `{ASSEMBLE}` (or `make site`) once")
    if offered is None:
        return Site(folder, {}, {"/server.json": json.dumps({"model": None}).encode()})
    url = f"/models/{offered.name}"
    described = {"name": offered.name, "url": quote(url), "size": offered.stat().st_size}
    return Site(folder, {url: offered}, {"/server.json": json.dumps({"model": described}).encode()})
