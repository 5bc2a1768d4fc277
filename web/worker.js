/**
 * The worker behind realm.js: boots Pyodide from `assets/`, keeps models (store.js), and passes calls on to
 * `realm_web.page` as JSON. Generation runs here, so the page never freezes.
 *
 * Messages in:  {id, call, args} starts a call, {id, cancel: true} breaks it off (an answer then ends normally).
 * Messages out: {id, event} any number of times, then {id, result} or {id, error: {name, message}}.
 * Model bytes go from the store to WebGPU as they are, never through Python's memory.
 */

import * as store from "./store.js";

const ASSETS = new URL("./assets/", import.meta.url).href;

const running = new Map(); // call id -> AbortController
let booted; // promise of {pyodide, page}, made by the first call that needs it

/** An error made for a person somewhere below: passed on by name and message. */
class CallError extends Error {
  constructor({ name, message }) {
    super(message);
    this.name = name;
  }
}

function boot() {
  booted ??= start().catch((error) => {
    booted = undefined;
    throw error;
  });
  return booted;
}

async function start() {
  let loadPyodide;
  try {
    ({ loadPyodide } = await import(`${ASSETS}pyodide.mjs`));
  } catch {
    throw new CallError({
      name: "SetupError",
      message: "The page's assets are missing: run `python web/build_site.py` and reload",
    });
  }
  const pyodide = await loadPyodide({
    indexURL: ASSETS,
    packageBaseUrl: ASSETS,
    packages: ["realm-web"],
    checkAPIVersion: true,
    env: { REALM_DEBUG: new URLSearchParams(self.location.search).get("debug") ?? "0" },
  });
  const page = pyodide.pyimport("realm_web.page").Page(store.notes);
  return { pyodide, page };
}

const calls = {
  /** The adapter that a model would run on, without booting Python. */
  async adapter() {
    const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) return { available: false, api: Boolean(navigator.gpu), name: null, fallback: false };
    const { description, vendor, architecture, isFallbackAdapter } = adapter.info;
    return {
      available: true,
      api: true,
      name: description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed adapter",
      fallback: Boolean(isFallbackAdapter ?? adapter.isFallbackAdapter),
    };
  },

  async boot() {
    await boot();
  },

  models: () => store.list(),
  remove: ({ name }) => store.remove(name),

  async load({ source, options }, { id, signal, emit }) {
    const booting = boot();
    booting.catch(() => {}); // reported below, once the source is there
    const report = (stage) => (progress) => emit({ stage, ...progress });
    let model;
    if (source.url) {
      const name = await store.download(source.url, { size: source.size, signal, onProgress: report("download") });
      model = await store.open(name);
    } else if (source.file && source.keep) {
      model = await store.open(await store.keep(source.file, { signal, onProgress: report("store") }));
    } else if (source.file) {
      model = store.fileSource(source.file);
    } else {
      model = await store.open(source.stored);
    }
    try {
      emit({ stage: "boot", done: 0, total: 0 });
      const { page } = await booting;
      return await python(page, "open", id, signal, model, JSON.stringify(options), (json) => emit(JSON.parse(json)));
    } catch (error) {
      model.close();
      throw error;
    }
  },

  async chat(request, { id, signal, emit }) {
    const { page } = await boot();
    return python(page, "chat", id, signal, JSON.stringify(request), (text) => emit({ text }));
  },

  async embed(request, { id, signal }) {
    const { page } = await boot();
    return python(page, "embed", id, signal, JSON.stringify(request));
  },

  async score(request, { id, signal }) {
    const { page } = await boot();
    return python(page, "score", id, signal, JSON.stringify(request));
  },

  async close({ model }, { id, signal }) {
    const { page } = await boot();
    return python(page, "close", id, signal, model);
  },
};

/** Call a method of `realm_web.page.Page`; its value comes back, its error is thrown here. */
async function python(page, method, id, signal, ...args) {
  const stop = () => page.stop(id);
  signal.addEventListener("abort", stop);
  if (signal.aborted) stop();
  try {
    const reply = JSON.parse(await page[method](id, ...args));
    if (reply.error) throw new CallError(reply.error);
    return reply.ok;
  } finally {
    signal.removeEventListener("abort", stop);
  }
}

self.onmessage = async ({ data }) => {
  if (data.cancel) {
    running.get(data.id)?.abort();
    return;
  }
  const { id, call, args } = data;
  const controller = new AbortController();
  running.set(id, controller);
  const emit = (event) => self.postMessage({ id, event });
  try {
    const result = await calls[call](args ?? {}, { id, signal: controller.signal, emit });
    self.postMessage({ id, result });
  } catch (error) {
    const expected = error instanceof CallError || error instanceof store.StoreError || error.name === "AbortError";
    if (!expected) console.error(error);
    self.postMessage({ id, error: { name: error.name, message: error.message } });
  } finally {
    running.delete(id);
  }
};
