/**
 * Run GGUF language models in the page, on WebGPU. No build step, no dependency, no outside request.
 *
 *     import { Realm } from "./realm.js";
 *
 *     const realm = await Realm.load("/models/model.gguf", {
 *       onProgress: ({ stage, done, total, rate }) => console.log(stage, done / total, rate),
 *     });
 *     const messages = [{ role: "user", content: "Why is the sky blue?" }];
 *     for await (const piece of realm.chat(messages, { temperature: 0.7, max_tokens: 200 })) {
 *       document.body.append(piece);
 *     }
 *     console.log(realm.stats.predicted_per_second, "tokens per second on", realm.info.adapter);
 *
 * Everything heavy happens in one module worker (worker.js), started by the first call. Serve this file beside
 * worker.js, store.js and assets/ on https or localhost; cross-origin isolation (COOP/COEP) is not needed.
 */

/** An error with a message for a person; `name` says its kind, such as "FormatError" or "DeviceError". */
export class RealmError extends Error {
  constructor({ name, message }) {
    super(message);
    this.name = name;
  }
}

// `?debug=2` in the page's address: the console shows what every kernel takes.
const DEBUG = new URLSearchParams(globalThis.location?.search).get("debug");

/** Calls into the worker, and the events and results that come back. */
class Bridge {
  #worker = new Worker(new URL(DEBUG ? `./worker.js?debug=${Number(DEBUG)}` : "./worker.js", import.meta.url), {
    type: "module",
  });
  #waiting = new Map();
  #nextId = 1;

  constructor() {
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const error = { name: "WorkerError", message: event.message || "worker.js could not be loaded" };
      for (const id of [...this.#waiting.keys()]) this.#receive({ id, error });
    };
  }

  call(call, args, { signal, onEvent } = {}) {
    signal?.throwIfAborted();
    const id = this.#nextId++;
    const cancel = () => this.#worker.postMessage({ id, cancel: true });
    signal?.addEventListener("abort", cancel);
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, onEvent });
      this.#worker.postMessage({ id, call, args });
    }).finally(() => signal?.removeEventListener("abort", cancel));
  }

  #receive({ id, event, result, error }) {
    const waiting = this.#waiting.get(id);
    if (!waiting) return;
    if (event !== undefined) return waiting.onEvent?.(event);
    this.#waiting.delete(id);
    if (error?.name === "AbortError") waiting.reject(new DOMException(error.message, "AbortError"));
    else if (error) waiting.reject(new RealmError(error));
    else waiting.resolve(result);
  }
}

let shared;
const bridge = () => (shared ??= new Bridge());

/** One loaded model. Made by `Realm.load`. */
export class Realm {
  #model;
  #answers = new Set(); // an AbortController for every answer being written

  /**
   * What was loaded: {name, file, size, architecture, adapter, fallback, context}. `adapter` is the GPU's name,
   * `fallback` tells that it is really a processor, `context` counts tokens.
   */
  info;

  /**
   * The answer that ended last: {finish_reason, prompt_tokens, cached_tokens, completion_tokens, predicted_per_second,
   * prompt_per_second, time_to_first_token_ms}; null before the first. finish_reason is "stop", "length" or "abort"
   * (stopped).
   */
  stats = null;

  constructor({ model, ...info }) {
    this.#model = model;
    this.info = info;
  }

  /**
   * Load a model.
   *
   * @param {string | File} source a URL (absolute or relative: anything with a slash; downloaded once, then kept by
   *   the browser), a File, or the name of a kept model
   * @param {object} [options]
   * @param {(p: {stage: string, done: number, total: number, rate?: number, label?: string}) => void} [options.onProgress]
   *   stages: "download" and "store" (bytes, with bytes per second as rate), "boot" (Python starts), "load" (bytes to
   *   the GPU), "compile" (kernels). total is 0 when unknown.
   * @param {AbortSignal} [options.signal] breaks off a download; what has come stays and the next load goes on from it
   * @param {number} [options.context] tokens that one answer and its prompt may have; default: the model's, at most 8192
   * @param {number | "max"} [options.kv_tokens] tokens of all answers at a time; default: as many as context
   * @param {"f16" | "f32" | "q8_0"} [options.kv_type] how they are kept; q8_0 takes half the memory of f16, the default
   * @param {number} [options.max_seqs] answers written at a time, more wait; default 8
   * @param {number} [options.max_rows] tokens of a prompt that one step takes; default 512
   * @param {boolean} [options.keep] copy a File into the browser's store, to be loaded by its name later
   * @param {number} [options.size] the length that a URL's file must have, if known
   * @returns {Promise<Realm>}
   */
  static async load(source, { onProgress, signal, keep = false, size, ...options } = {}) {
    const where =
      source instanceof Blob
        ? { file: source, keep }
        : /[/:]/.test(source)
          ? { url: new URL(source, location.href).href, size }
          : { stored: source };
    return new Realm(await bridge().call("load", { source: where, options }, { signal, onEvent: onProgress }));
  }

  /** Start Python now rather than at the first load. */
  static boot() {
    return bridge().call("boot");
  }

  /** The GPU that a model would run on: {available, api, name, fallback}. `api`: the browser knows WebGPU at all. */
  static adapter() {
    return bridge().call("adapter");
  }

  /** Models kept by the browser: [{name, bytes, size, complete, url}], partial downloads included. */
  static models() {
    return bridge().call("models");
  }

  /** Delete a kept model or a partial download. */
  static remove(name) {
    return bridge().call("remove", { name });
  }

  /**
   * Answer a conversation, piece by piece as it is written. Leaving the loop early stops the answer. Several may be
   * written at once: they share the model, and each step runs for all of them.
   *
   * @param {{role: "system" | "user" | "assistant", content: string}[]} messages
   * @param {object} [options] as in Python: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
   *   frequency_penalty, logit_bias, seed, max_tokens, min_tokens, stop, stop_token_ids, ignore_eos, response_format
   * @returns {AsyncGenerator<string>}
   */
  chat(messages, options = {}) {
    return this.#stream({ messages, options });
  }

  /** Continue a text as it stands, without the chat template. Options as for `chat`. */
  generate(prompt, options = {}) {
    return this.#stream({ prompt, options });
  }

  /** A text as one vector of length 1. options.pooling: "mean", "last" or "cls"; default: the model's own, or mean. */
  async embed(text, options = {}) {
    return bridge().call("embed", { text, options, model: this.#model });
  }

  /** How likely a text is: {token_ids, logprobs}, the natural logarithms; null for the first token. */
  async score(text) {
    return bridge().call("score", { text, model: this.#model });
  }

  /** End every answer that is being written; their loops finish normally, with `stats.finish_reason` "abort". */
  stop() {
    for (const answer of this.#answers) answer.abort();
  }

  /** Give the model's GPU memory back. The object is of no use afterwards. */
  async close() {
    this.stop();
    await bridge().call("close", { model: this.#model });
  }

  async *#stream(request) {
    const answer = new AbortController();
    const pieces = [];
    let wake = () => {};
    let finished = false;
    const onEvent = ({ text }) => {
      pieces.push(text);
      wake();
    };
    const done = bridge()
      .call("chat", { ...request, model: this.#model }, { signal: answer.signal, onEvent })
      .finally(() => {
        finished = true;
        wake();
      });
    done.catch(() => {}); // thrown below
    this.#answers.add(answer);
    try {
      for (;;) {
        if (pieces.length) yield pieces.splice(0).join("");
        else if (finished) break;
        else await new Promise((resolve) => (wake = resolve));
      }
      this.stats = await done;
    } finally {
      if (!finished) {
        answer.abort(); // the loop was left early
        this.stats = await done.catch(() => null);
      }
      this.#answers.delete(answer);
    }
  }
}
