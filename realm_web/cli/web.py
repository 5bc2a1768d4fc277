"""Serve the page, and model files with it, on this machine only. Nothing is fetched from elsewhere."""

import argparse
import json
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

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
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="the .gguf files to offer (default: the demo model)"
    )
    parser.add_argument("--no-model", action="store_true", help="offer no model, not even the default one")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any free (default: %(default)s)"
    )
    parser.add_argument("--site", type=Path, default=CHECKOUT_SITE, metavar="DIR", help="folder of the page")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--verbose", action="store_true", help="log every request")


def main(args: argparse.Namespace) -> int:
    from realm_web.cli.terminal import note

    if args.no_model and args.models:
        raise RequestError("--no-model and a model given; drop one of them")
    site = build_site(args.site, [] if args.no_model else offered_models(args.models))
    with server(site, args.port, quiet=not args.verbose) as http:
        address = f"http://localhost:{http.server_port}/"
        if not site.extra:
            note("no model is offered; open a file or a URL in the page")
        print(f"{address} (Ctrl-C ends)", flush=True)
        if args.open:
            threading.Timer(0.2, webbrowser.open, [address]).start()
        http.serve_forever()
    return 0


def offered_models(names: Sequence[str]) -> list[Path]:
    """The files to offer: those named, else the default one if there is any."""
    if not names:
        try:
            names = [model.model_or_default(None)]
        except RequestError:
            return []
    for name in names:
        if not Path(name).is_file():
            raise RequestError(f"{name}: no such file; URLs are not offered but opened in the page")
    return [Path(name) for name in names]


def build_site(folder: Path, models: Sequence[Path] = ()) -> Site:
    """The site in `folder` with `models` under /models/; RequestError when page or assets are missing.

    The page learns of them by /models.json: [{"name": ..., "file": ..., "size": bytes}, ...].
    """
    if not (folder / "index.html").is_file():
        raise RequestError(
            f"{folder}: no index.html; `realm web` needs the web folder of the source, --site DIR"
        )
    if not (folder / "assets" / "pyodide.mjs").is_file():
        raise RequestError(f"{folder / 'assets'}: not assembled yet; run `{ASSEMBLE}` (or `make site`) once")
    files = {f"/models/{path.name}": path for path in models}
    if len(files) < len(models):
        raise RequestError("two models have the same file name; the page could not tell them apart")
    listed = [{"name": path.stem, "file": path.name, "size": path.stat().st_size} for path in models]
    return Site(folder, files, {"/models.json": json.dumps(listed).encode()})
