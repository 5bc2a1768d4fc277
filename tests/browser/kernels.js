/** The worker of the kernel tests: every message is one kernel to run, answered in order. */

import { loadPyodide } from "/assets/pyodide.mjs";

const SERVE = `
import base64, json, traceback
from kernel_run import run_kernel
from realm_web.runtime.adapters import open_device
from realm_web.step import StepLayout

device = await open_device()

async def answer(request):
    wanted = json.loads(request)
    if not wanted:
        return json.dumps({"name": device.name, "features": sorted(device.features), "subgroup_size": device.subgroup_size})
    try:
        consts = {k: StepLayout(**v) if isinstance(v, dict) else v for k, v in wanted["consts"].items()}
        tensors = [base64.b64decode(data) for data in wanted["tensors"]]
        made = await run_kernel(device, wanted["kernel"], consts, tensors, wanted["outputs"], wanted["grid"])
        return json.dumps({"outputs": [base64.b64encode(data).decode() for data in made]})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})

answer
`;

async function start() {
  const assets = new URL("/assets/", location.href).href;
  const pyodide = await loadPyodide({ indexURL: assets, packageBaseUrl: assets, packages: ["realm-web"] });
  pyodide.FS.writeFile("/home/pyodide/kernel_run.py", await (await fetch("kernel_run.py")).text());
  return pyodide.runPythonAsync(SERVE);
}

let last = start();
const ready = last;
ready.catch((error) => self.postMessage(JSON.stringify({ error: String(error) })));
self.onmessage = ({ data }) => {
  last = last.then(async () => self.postMessage(await (await ready)(data)));
};
