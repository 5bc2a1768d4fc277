/** The worker of the grammar tests: a message is a response format and token ids, its answer all the masks. */

import { loadPyodide } from "/assets/pyodide.mjs";

const SERVE = `
import asyncio, base64, json, time, zlib
from pyodide.http import pyfetch
from realm_web import gguf
from realm_web.errors import RequestError
from realm_web.grammar import open_grammar
from realm_web.tokenizer import Tokenizer

async def read_metadata(url):
    n = 1 << 22
    while True:
        answer = await pyfetch(url, headers={"Range": f"bytes=0-{n - 1}"})
        try:
            return gguf.parse(await answer.bytes()).metadata
        except gguf.NeedMoreBytes:
            n *= 2

tokenizer = Tokenizer.from_metadata(await read_metadata("/grammar/model.gguf"))
started = time.perf_counter()
engine = await open_grammar(tokenizer, tokenizer.n_vocab + 64)
opened = time.perf_counter() - started

def answer(request):
    wanted = json.loads(request)
    started = time.perf_counter()
    try:
        matcher = engine.compile(wanted["format"])
    except RequestError as error:
        return json.dumps({"error": str(error)})
    times = [time.perf_counter() - started]
    masks, accepted = [], []
    for token in [*wanted["tokens"], None]:
        started = time.perf_counter()
        masks.append(bytes(matcher.mask()))
        times.append(time.perf_counter() - started)
        if token is not None:
            accepted.append(matcher.accept(token))
    packed = base64.b64encode(zlib.compress(b"".join(masks))).decode()
    return json.dumps({"name": engine.name, "masks": packed, "accepted": accepted, "opened": opened,
                       "finished": matcher.is_finished, "times": times})

answer
`;

async function start() {
  const assets = new URL("/assets/", location.href).href;
  const pyodide = await loadPyodide({ indexURL: assets, packageBaseUrl: assets, packages: ["realm-web"] });
  return pyodide.runPythonAsync(SERVE);
}

const ready = start();
self.onmessage = async ({ data }) => {
  try {
    self.postMessage((await ready)(data));
  } catch (error) {
    self.postMessage(JSON.stringify({ error: String(error) }));
  }
};
