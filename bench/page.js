/**
 * The worker of bench/page.html: measures inside, in the page's own Python, with the tests of `realm bench`.
 *
 * Message in: {model, disable, parts: [[name, options], ...]}. Messages out: one object for each result, the last
 * with `ended`. Serve it in the same folder as worker.js; it needs page_bench.py beside it.
 */

import * as store from "./store.js";

const ASSETS = new URL("./assets/", import.meta.url).href;
const say = (result) => self.postMessage(result);

async function boot(disable) {
  const { loadPyodide } = await import(`${ASSETS}pyodide.mjs`);
  const pyodide = await loadPyodide({
    indexURL: ASSETS,
    packageBaseUrl: ASSETS,
    packages: ["realm-web"],
    checkAPIVersion: true,
    env: { REALM_DISABLE: disable },
  });
  const code = await (await fetch(new URL("./page_bench.py", import.meta.url))).text();
  pyodide.FS.writeFile("page_bench.py", code);
  return pyodide.pyimport("page_bench").InPage(store.notes, (json) => say(JSON.parse(json)));
}

self.onmessage = async ({ data: { model, disable = "", parts } }) => {
  try {
    const start = performance.now();
    const inside = await boot(disable);
    say({ test: "boot", disable, seconds: (performance.now() - start) / 1e3 });
    const name = await store.download(new URL(model, self.location.href).href);
    for (const [part, options] of parts) {
      const started = performance.now();
      try {
        if (part === "open") await inside.run(part, JSON.stringify(options), await store.open(name));
        else await inside.run(part, JSON.stringify(options));
      } catch (error) {
        say({ part, error: String(error.message ?? error).slice(-600) });
        if (part === "open") break;
      }
      say({ part, seconds: Math.round(performance.now() - started) / 1e3 });
    }
  } catch (error) {
    say({ error: String(error.message ?? error).slice(-600) });
  }
  say({ ended: true });
};
