"""Show the machine as realm_web sees it: adapters, what each can do, which one is chosen and why."""

import argparse
import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import realm_web
from realm_web import env
from realm_web.cli import model, options
from realm_web.cli.text import human_bytes
from realm_web.errors import DeviceError

if TYPE_CHECKING:
    from realm_web.runtime.device import AdapterInfo

EXAMPLES = """examples:
  realm doctor
  realm doctor --device cpu    what is chosen when cpu is asked for"""

UNLIMITED = 1 << 50  # bytes; the CPU backend reports such a limit where it has none
NO_GPU = (
    "No GPU adapter: install the graphics driver of your card with its Vulkan part, or, without a card, "
    "a software one (Debian: apt-get install mesa-vulkan-drivers)."
)
PACKAGES = ("wgpu", "numpy", "jinja2", "huggingface_hub")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(args: argparse.Namespace) -> int:
    from realm_web.runtime.adapters import choose, list_adapters

    adapters = list_adapters()
    try:
        chosen, reason = choose(args.device)
    except DeviceError as error:
        chosen, reason = None, str(error)
    if args.json:
        print(json.dumps(_as_json(adapters, chosen, reason), default=sorted))
    else:
        _print(adapters, chosen, reason)
    return 0 if chosen else 2


def _software() -> dict[str, str]:
    found = {"realm_web": realm_web.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"system": platform.platform(), "default model": str(model.find_default_model() or "none")}


def _as_json(adapters: "list[AdapterInfo]", chosen: "AdapterInfo | None", reason: str) -> dict[str, object]:
    return {
        "software": _software(),
        "variables": {name: env.get(name) for name in env.VARIABLES},
        "unknown_variables": env.unknown_names(),
        "adapters": [dataclasses.asdict(adapter) for adapter in adapters],
        "chosen": adapters.index(chosen) if chosen else None,
        "reason": reason,
    }


def _print(adapters: "list[AdapterInfo]", chosen: "AdapterInfo | None", reason: str) -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    changed = {name: env.get(name) for name in env.VARIABLES if env.get(name) != env.VARIABLES[name].default}
    out.table(("software", ""), (_software() | changed).items())
    for name in env.unknown_names():
        out.line(
            f"{name} is set, but there is no such variable; known: {', '.join(env.VARIABLES)}", style="yellow"
        )
    out.table(
        ("", "adapter", "device", "through", "type", "can", "largest binding", "largest buffer"),
        (("→" if adapter == chosen else "", *_described(adapter)) for adapter in adapters),
    )
    if all(adapter.kind != "webgpu" for adapter in adapters):
        out.line(NO_GPU, style="yellow")
    if chosen:
        out.line(f"Chosen: {chosen.name} ({chosen.kind}): {reason}.", style="green")
    else:
        out.line(f"No device: {reason}", style="red")


def _described(adapter: "AdapterInfo") -> tuple[str, ...]:
    disabled = env.disabled_features()
    features = [f"{name} (disabled)" if name in disabled else name for name in sorted(adapter.features)]
    if adapter.subgroup_size:
        features.append(f"subgroup size {adapter.subgroup_size}")
    return (
        adapter.name,
        adapter.kind,
        f"{adapter.backend} {adapter.driver}".strip(),
        adapter.adapter_type,
        ", ".join(features) or "–",
        _limit(adapter.limits.max_binding),
        _limit(adapter.limits.max_buffer),
    )


def _limit(nbytes: int) -> str:
    return human_bytes(nbytes) if nbytes < UNLIMITED else "memory"
