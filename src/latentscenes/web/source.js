// Where the files of a published library come from: a server, or data within the page. All reads are bounded.

/** What cannot be read or shown, in a sentence for the reader of the page. */
export class Unreadable extends Error {}

/** Reads files below an address, whole or in part. */
export class ServerSource {
  /** `address` is that of the folder, relative to the page. */
  constructor(address) {
    this.base = new URL(address.endsWith("/") ? address : address + "/", document.baseURI);
  }

  /** Returns a file of at most `most` bytes; of exactly `bytes`, if given. */
  async whole(path, most, bytes = null) {
    const response = await this.#fetch(path, bytes === null ? {cache: "no-cache"} : {});
    const decoded = response.headers.get("content-encoding") !== null; // then `bytes` is not the body's size
    const limit = decoded || bytes === null ? most : Math.min(most, bytes);
    const found = await collect(response.body, 0, null, limit, path);
    if (bytes !== null && !decoded && found.length !== bytes) {
      throw new Unreadable(`${path}: ${found.length} bytes instead of ${bytes}.`);
    }
    return found;
  }

  /** Returns `bytes` bytes from `offset` on. Servers that ignore ranges are read up to there. */
  async part(path, offset, bytes) {
    const response = await this.#fetch(path, {headers: {Range: `bytes=${offset}-${offset + bytes - 1}`}});
    const range = /^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "");
    if (response.status === 206 && range && Number(range[1]) !== offset) {
      throw new Unreadable(`${path}: the server sent another part of the file than asked for.`);
    }
    return collect(response.body, response.status === 206 ? 0 : offset, bytes, Infinity, path);
  }

  async #fetch(path, options) {
    let response;
    try {
      response = await fetch(new URL(path, this.base), options);
    } catch {
      throw new Unreadable(`${new URL(path, this.base)} cannot be reached.`);
    }
    if (!response.ok || !response.body) {
      throw new Unreadable(`${new URL(path, this.base)}: the server answers ${response.status}.`);
    }
    return response;
  }
}

/** Reads files that the page holds as base64 texts by path. */
export class InnerSource {
  #decoded = new Map();

  constructor(files) {
    this.files = files;
  }

  async whole(path, most, bytes = null) {
    const found = this.#decode(path);
    if (found.length > most || (bytes !== null && found.length !== bytes)) {
      throw new Unreadable(`${path}: ${found.length} bytes instead of ${bytes ?? most}.`);
    }
    return found;
  }

  async part(path, offset, bytes) {
    const found = this.#decode(path);
    if (found.length < offset + bytes) throw new Unreadable(`${path}: ends after ${found.length} bytes.`);
    return found.slice(offset, offset + bytes);
  }

  #decode(path) {
    if (!Object.hasOwn(this.files, path)) throw new Unreadable(`${path}: not in this page.`);
    if (!this.#decoded.has(path)) {
      const text = atob(this.files[path]), found = new Uint8Array(text.length);
      for (let k = 0; k < text.length; k++) found[k] = text.charCodeAt(k);
      this.#decoded.set(path, found);
    }
    return this.#decoded.get(path);
  }
}

/**
 * Reads a stream and cancels the rest.
 *
 * skip: bytes to leave out at the start.
 * wanted: number of bytes after these; null: all up to the end.
 * most: throws if there are more.
 */
export async function collect(stream, skip, wanted, most, what) {
  const reader = stream.getReader(), parts = [];
  let seen = 0;
  try {
    while (wanted === null || seen < skip + wanted) {
      const {done, value} = await reader.read();
      if (done) break;
      const from = Math.max(0, skip - seen), end = wanted === null ? value.length : skip + wanted - seen;
      if (from < value.length) parts.push(value.subarray(from, Math.max(from, Math.min(value.length, end))));
      seen += value.length;
      if (seen - skip > most) throw new Unreadable(`${what}: more than ${most} bytes.`);
    }
  } catch (problem) {
    if (problem instanceof Unreadable) throw problem;
    throw new Unreadable(`${what}: damaged, or the connection broke.`);
  } finally {
    reader.cancel().catch(() => {});
  }
  const found = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((place, part) => (found.set(part, place), place + part.length), 0);
  if (wanted !== null && found.length !== wanted) throw new Unreadable(`${what}: ends too early.`);
  return found;
}

/** Inflates zlib ("deflate") or gzip bytes to at most `most` bytes. */
export function inflate(bytes, format, most, what) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format));
  return collect(stream, 0, null, most, what);
}

/** Parses JSON, gzipped or not. */
export async function json(bytes, most, what) {
  const zipped = bytes[0] === 0x1f && bytes[1] === 0x8b;
  const plain = zipped ? await inflate(bytes, "gzip", most, what) : bytes;
  try {
    return JSON.parse(new TextDecoder("utf-8", {fatal: true}).decode(plain));
  } catch {
    throw new Unreadable(`${what}: no JSON.`);
  }
}
