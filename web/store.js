/**
 * Models kept by the browser: a folder of the origin private file system (OPFS).
 *
 * A model is two files, `NAME` (the bytes) and `NAME.json` (the note: where it came from, how long it must be and
 * whether it is complete). A download that broke off stays as it is and goes on at the next attempt, unless the
 * server's file has changed. Runs in a worker only: synchronous access handles exist nowhere else.
 * Knows nothing of Python or of the page.
 */

const FOLDER = "realm-models";
const NOTES = "realm-notes";
const READ_CHUNK = 8 << 20;
const ATTEMPTS = 4;

/** An error whose message is written for a person. */
export class StoreError extends Error {
  name = "StoreError";
}

/** The download broke off on the way: worth another attempt from where it stopped. */
class Interrupted extends Error {}

/** @returns {Promise<{name: string, bytes: number, size: number | null, complete: boolean, url: string | null}[]>} */
export async function list() {
  const models = [];
  const directory = await folder();
  for await (const [name, handle] of directory.entries()) {
    if (handle.kind !== "file" || name.endsWith(".json")) continue;
    const bytes = (await handle.getFile()).size;
    const note = await readNote(directory, name);
    const complete = isComplete(note, bytes);
    models.push({ name, bytes, size: note?.size ?? null, complete, url: note?.url ?? null });
  }
  return models.sort((a, b) => a.name.localeCompare(b.name));
}

/** Delete a model, whole or partial. */
export async function remove(name) {
  const directory = await folder();
  for (const file of [name, `${name}.json`]) {
    try {
      await directory.removeEntry(file);
    } catch (error) {
      if (error.name === "NotFoundError") continue;
      throw new StoreError(`${name} is in use and cannot be deleted: load another model first, or close the other tab`);
    }
  }
}

/**
 * Bring a URL into the store, or find it there: a complete model is never asked for again.
 *
 * @param {string} url absolute
 * @param {{size?: number, signal?: AbortSignal, onProgress?: (p: {done: number, total: number, rate: number}) => void}} options
 *   `size`: the length the file must have, if known; a stored model of another length is replaced.
 * @returns {Promise<string>} its name in the store
 */
export async function download(url, { size, signal, onProgress } = {}) {
  const directory = await folder();
  const name = await freeName(directory, new URL(url).pathname.split("/").pop(), url);
  let note = await readNote(directory, name);
  if (note && size !== undefined && note.size !== size) note = null;
  if (isComplete(note, await storedSize(directory, name))) return name;

  const file = await lock(directory, name);
  try {
    for (let attempt = 1; ; attempt += 1) {
      try {
        note = await fetchInto(file, directory, name, url, { note, signal, onProgress });
        break;
      } catch (error) {
        signal?.throwIfAborted();
        if (!(error instanceof Interrupted)) throw error;
        if (attempt === ATTEMPTS) throw new StoreError(error.message);
        note = await readNote(directory, name);
        await new Promise((resolve) => setTimeout(resolve, 250 * 2 ** attempt));
      }
    }
    await finish(file, directory, name, note);
  } catch (error) {
    if (error.discard || file.getSize() === 0) {
      file.close();
      await remove(name);
    }
    throw error;
  } finally {
    file.close();
  }
  return name;
}

/** Copy a local file into the store; one of the same name, length and date is the same. Returns its name there. */
export async function keep(file, { signal, onProgress } = {}) {
  const directory = await folder();
  const name = await freeName(directory, file.name, null);
  const note = { url: null, size: file.size, etag: String(file.lastModified), complete: false };
  const owner = await readNote(directory, name);
  const same = owner?.size === note.size && owner.etag === note.etag;
  if (same && isComplete(owner, await storedSize(directory, name))) return name;

  const handle = await lock(directory, name);
  try {
    await checkRoom(file.size, handle.getSize());
    handle.truncate(0);
    await writeNote(directory, name, note);
    const report = meter(file.size, 0, onProgress);
    for (let offset = 0; offset < file.size; ) {
      signal?.throwIfAborted();
      const chunk = new Uint8Array(await file.slice(offset, offset + READ_CHUNK).arrayBuffer());
      write(handle, chunk, offset);
      report((offset += chunk.byteLength));
    }
    await finish(handle, directory, name, note);
  } catch (error) {
    handle.close();
    await remove(name); // the original is at hand: a half copy is worth nothing
    throw error;
  } finally {
    handle.close();
  }
  return name;
}

/**
 * A stored model as something to read from: {name, size, read(offset, nbytes) -> Promise<Uint8Array>, close(),
 * reopen() -> Promise of the same again}; what lies past the end is left out.
 * A shared read-only handle where the browser has them (8 GB/s); else, or when another tab holds the only one, the
 * file through the Blob interface.
 */
export async function open(name) {
  const directory = await folder();
  const entry = await directory.getFileHandle(name).catch(() => {
    throw new StoreError(`${name} is not among the stored models`);
  });
  const note = await readNote(directory, name);
  const file = await entry.getFile();
  if (!isComplete(note, file.size)) {
    throw new StoreError(`${name} is incomplete (${file.size} of ${note?.size ?? "?"} bytes): download it again`);
  }
  let handle;
  try {
    handle = await entry.createSyncAccessHandle({ mode: "read-only" });
  } catch {
    return fileSource(file);
  }
  return {
    name,
    size: file.size,
    async read(offset, nbytes) {
      const bytes = new Uint8Array(Math.max(0, Math.min(nbytes, file.size - offset)));
      const got = handle.read(bytes, { at: offset });
      if (got !== bytes.length) throw new StoreError(`${got} bytes came instead of ${bytes.length} at ${offset}`);
      return bytes;
    },
    close: () => handle.close(),
    reopen: () => open(name),
  };
}

/** A File (from a picker or a drop) as something to read from; nothing is copied beforehand. */
export function fileSource(file) {
  return {
    name: file.name,
    size: file.size,
    async read(offset, nbytes) {
      return new Uint8Array(await file.slice(offset, offset + nbytes).arrayBuffer());
    },
    close() {},
    reopen: async () => fileSource(file),
  };
}

/** Small texts by name, such as what was measured of the kernels; where nothing can be kept they are forgotten. */
export const notes = {
  async get(name) {
    try {
      return await (await (await (await folder(NOTES)).getFileHandle(name)).getFile()).text();
    } catch {
      return undefined;
    }
  },
  async put(name, text) {
    try {
      const handle = await (await (await folder(NOTES)).getFileHandle(name, { create: true })).createSyncAccessHandle();
      handle.truncate(0);
      handle.write(new TextEncoder().encode(text));
      handle.close();
    } catch (error) {
      console.info(`${name} is not kept: ${error.message}`);
    }
  },
};

async function folder(name = FOLDER) {
  try {
    const root = await navigator.storage.getDirectory();
    return await root.getDirectoryHandle(name, { create: true });
  } catch (error) {
    throw new StoreError(
      `This browser does not let the page store files here (${error.name}); leave private browsing, or choose a file`,
    );
  }
}

/** The only open handle of a model's bytes: nobody else may read or write meanwhile. */
async function lock(directory, name) {
  const entry = await directory.getFileHandle(name, { create: true });
  try {
    return await entry.createSyncAccessHandle();
  } catch {
    throw new StoreError(`${name} is in use in another tab; close that tab, or wait for its download`);
  }
}

/** One request: from the start, or from where the last one stopped. Resolves to the note once all bytes are there. */
async function fetchInto(file, directory, name, url, { note, signal, onProgress }) {
  let offset = note?.size ? Math.min(file.getSize(), note.size) : 0;
  if (note?.size && offset === note.size) return note;
  const headers = offset ? { Range: `bytes=${offset}-` } : {};
  let response;
  try {
    response = await fetch(url, { headers, signal, cache: "no-store" });
  } catch {
    const what = `${url}: no answer. The address is wrong, the network is down, or the server does not let pages read it`;
    throw offset ? new Interrupted(what) : new StoreError(what);
  }
  if (response.status >= 500) throw new Interrupted(`${url}: the server says ${response.status}`);
  if (!response.ok && !(offset && response.status === 416)) {
    throw new StoreError(`${url}: the server says ${response.status} ${response.statusText}`.trim());
  }
  const etag = response.headers.get("ETag");
  const length = response.headers.has("Content-Encoding") ? null : Number(response.headers.get("Content-Length")) || null;
  const resumed = response.status === 206 && length === note.size - offset && sameTag(etag, note.etag);
  if (offset && !resumed && response.status !== 200) {
    await response.body?.cancel();
    return fetchInto(file, directory, name, url, { note: null, signal, onProgress }); // another file by now: anew
  }
  if (!resumed) {
    offset = 0;
    await checkRoom(length ?? 0, file.getSize());
    file.truncate(0);
    note = { url, size: length, etag, complete: false };
    await writeNote(directory, name, note);
  }

  const report = meter(note.size, offset, onProgress);
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const start = offset;
      write(file, value, offset);
      offset += value.byteLength;
      if (start < 4 && offset >= 4) checkMagic(file, url);
      report(offset);
    }
  } catch (error) {
    await reader.cancel().catch(() => {});
    if (error instanceof StoreError) throw error;
    throw new Interrupted(`${url}: the download broke off at ${offset} of ${note.size ?? "?"} bytes; load it again to resume`);
  } finally {
    file.flush();
  }
  if (note.size !== null && offset < note.size) {
    throw new Interrupted(`${url}: the download ended at ${offset} of ${note.size} bytes; load it again to resume`);
  }
  return note;
}

/** The bytes are all there: check the length on disk, then say so in the note. */
async function finish(file, directory, name, note) {
  file.flush();
  const size = file.getSize();
  if (note.size !== null && size !== note.size) {
    throw discard(new StoreError(`${name}: ${size} bytes were stored instead of ${note.size}; discarded, load it again`));
  }
  await writeNote(directory, name, { ...note, size, complete: true });
}

/** Write all bytes or throw. A full disk shows only in the count that write() returns, a huge number at times. */
function write(file, bytes, offset) {
  let written;
  try {
    written = file.write(bytes, { at: offset });
  } catch (error) {
    throw discard(new StoreError(`The browser could not store the model (${error.name}): free some space, or choose a file`));
  }
  if (written !== bytes.byteLength) {
    throw discard(new StoreError("The browser stopped storing the model: disk or quota full. Free some space, or choose a file"));
  }
}

function checkMagic(file, url) {
  const magic = new Uint8Array(4);
  file.read(magic, { at: 0 });
  if (String.fromCharCode(...magic) !== "GGUF") throw discard(new StoreError(`${url} is not a GGUF model file`));
}

async function checkRoom(needed, freed) {
  const { quota, usage } = await navigator.storage.estimate();
  const room = quota - usage + freed;
  if (needed > room) {
    const megabytes = (n) => `${Math.round(n / 1e6)} MB`;
    throw discard(
      new StoreError(`The model needs ${megabytes(needed)}, the browser grants this page ${megabytes(room)}: delete stored models`),
    );
  }
}

function discard(error) {
  error.discard = true;
  return error;
}

/** Progress, ten times a second at most, with the rate of the last few seconds in bytes per second. */
function meter(total, start, onProgress) {
  const marks = [[performance.now(), start]];
  let next = 0;
  return (done) => {
    const now = performance.now();
    if (!onProgress || (now < next && done !== total)) return;
    next = now + 100;
    marks.push([now, done]);
    while (marks.length > 2 && now - marks[0][0] > 3000) marks.shift();
    const rate = ((done - marks[0][1]) / Math.max(now - marks[0][0], 1)) * 1000;
    onProgress({ done, total: total ?? 0, rate });
  };
}

/** The name that a model of this origin has, or shall have: with a mark if the plain name belongs to another. */
async function freeName(directory, text, url) {
  const name = safeName(text);
  const owner = await readNote(directory, name);
  if (!owner || owner.url === url) return name;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(url ?? "file")));
  const mark = [...digest.slice(0, 4)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return name.replace(/\.gguf$/, `-${mark}.gguf`);
}

function safeName(text) {
  const name = text.replace(/[^\w.+()-]+/g, "_").replace(/^\.+/, "").slice(-120) || "model";
  return name.toLowerCase().endsWith(".gguf") ? name.replace(/\.gguf$/i, ".gguf") : `${name}.gguf`;
}

function isComplete(note, bytes) {
  return Boolean(note?.complete) && note.size === bytes;
}

/** Weak and strong tags of the same bytes differ only in the prefix; a server may give none. */
function sameTag(a, b) {
  return !a || !b || a.replace(/^W\//, "") === b.replace(/^W\//, "");
}

async function storedSize(directory, name) {
  try {
    return (await (await directory.getFileHandle(name)).getFile()).size;
  } catch {
    return 0;
  }
}

async function readNote(directory, name) {
  try {
    const file = await (await directory.getFileHandle(`${name}.json`)).getFile();
    return JSON.parse(await file.text());
  } catch {
    return null; // none, or cut short by a crash: the model counts as absent
  }
}

async function writeNote(directory, name, note) {
  const entry = await directory.getFileHandle(`${name}.json`, { create: true });
  const handle = await entry.createSyncAccessHandle();
  try {
    handle.truncate(0);
    write(handle, new TextEncoder().encode(JSON.stringify(note)), 0);
    handle.flush();
  } finally {
    handle.close();
  }
}
