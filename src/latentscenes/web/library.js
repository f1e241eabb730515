// A published library: finds and reads single scenes, the shared model, thumbnails and pages of the index.
// Its files are described in docs/published.md. What they say is checked before anything is allocated.

import {Unreadable, inflate, json} from "./source.js";
import {isCount, parseTensors} from "./tensors.js";

export const FORMAT = "latentscenes published 1";
const MEBIBYTE = 1 << 20;
/** The most bytes that are read of each kind of file, and that its JSON may inflate to. */
const MOST = {description: 16 * MEBIBYTE, json: 16 * MEBIBYTE, inflated: 64 * MEBIBYTE, model: 512 * MEBIBYTE,
              scene: 64 * MEBIBYTE, atlas: 16 * MEBIBYTE, weights: 64 * MEBIBYTE};
const PATH = /^[a-z]+\/(?:[0-9a-f]{2}\/)?[0-9a-f]{32}\.[a-z0-9.]+$/;
/** Least and largest values of numbers in `render`. */
const RANGES = {resolution: [1, 512], micro: [0, 128], macro: [0, 128], bases: [0, 10000], hidden: [1, 256],
                coarse: [2, 128], fine: [0, 128], frequencies: [0, 10]};
const KEPT = 64;

export class PublishedLibrary {
  #kept = new Map();

  /** Reads the description. `source` is a ServerSource or an InnerSource. */
  static async open(source) {
    const name = "published.json", bytes = await source.whole(name, MOST.description);
    return new PublishedLibrary(source, await json(bytes, MOST.description, name));
  }

  constructor(source, description) {
    this.source = source;
    this.description = checked(description);
    this.render = description.render;
  }

  /** Number of scenes. */
  get count() {
    return this.description.scenes;
  }

  /** Returns {row, pack, offset, bytes, atlas, cell, sha256} of a scene; null if there is none. */
  async find(name) {
    const {names} = this.description, entry = names[fnv1a(name) & (names.length - 1)];
    const bucket = await this.#json(entry);
    if (!Object.hasOwn(bucket, name)) return null;
    const found = bucket[name];
    if (!Array.isArray(found) || found.length !== 7) {
      throw new Unreadable(`${entry.file}: an entry of no place.`);
    }
    const [row, pack, offset, bytes, atlas, cell, sha256] = found;
    return {row, pack, offset, bytes, atlas, cell, sha256};
  }

  /** Returns a page of the index: an object with an array for each column. */
  async page(number) {
    const entry = this.description.pages[number];
    if (!entry) throw new Unreadable(`the library has no page ${number}.`);
    const page = await this.#json(entry), {name} = page;
    if (!Array.isArray(name) || name.length > this.description.page_size) {
      throw new Unreadable(`${entry.file}: no page of scenes.`);
    }
    for (const [column, values] of Object.entries(page)) {
      if (!Array.isArray(values) || values.length !== name.length) {
        throw new Unreadable(`${entry.file}: column ${column.slice(0, 40)} does not fit the others.`);
      }
    }
    return page;
  }

  /** Returns the tensors of the scene at a place. */
  async tensors(place) {
    const file = await this.file(place);
    return parseTensors(file, this.description.packs[place.pack].file);
  }

  /** Returns the safetensors file of the scene at a place. */
  async file({pack, offset, bytes, sha256}) {
    const entry = this.description.packs[isCount(pack) ? pack : -1];
    if (!entry || !isCount(offset) || !isCount(bytes) || offset + bytes > entry.bytes || bytes > MOST.scene) {
      throw new Unreadable("the index names a place that no pack has. The library must be published again.");
    }
    const found = await this.source.part(entry.file, offset, bytes);
    await verify(found, sha256, entry.file);
    return found;
  }

  /** Returns the weights over the base planes of a page's scenes, one scene after another; null without any. */
  async weights(page) {
    const entry = this.description.weights[page], {bases} = this.render;
    if (!entry || !bases) return null;
    const found = await this.source.whole(entry.file, MOST.weights, entry.bytes);
    if (found.length % (4 * bases)) throw new Unreadable(`${entry.file}: no weights over ${bases} base planes.`);
    return new Float32Array(found.slice().buffer);
  }

  /** Returns the tensors of the shared model; read once. */
  model() {
    return this.#once("model", async () => {
      const {file, bytes, sha256} = this.description.web_model;
      const found = await this.source.whole(file, MOST.model, bytes);
      await verify(found, sha256, file);
      return parseTensors(found, file);
    });
  }

  /** Returns the thumbnail at a place of the index as an ImageBitmap; null without one. */
  async thumbnail({atlas, cell}) {
    if (!isCount(cell) || cell > 99) return null;
    const bytes = await this.atlas(atlas);
    if (!bytes) return null;
    const side = this.description.thumbnail, [x, y] = [cell % 10, Math.floor(cell / 10)];
    return createImageBitmap(new Blob([bytes], {type: "image/webp"}), x * side, y * side, side, side);
  }

  /** Returns a file of thumbnails (WebP); null if there is none of that number. */
  async atlas(number) {
    const entry = this.description.atlases[isCount(number) ? number : -1];
    return entry ? this.#once(entry.file, () => this.source.whole(entry.file, MOST.atlas, entry.bytes)) : null;
  }

  #json(entry) {
    return this.#once(entry.file, async () => {
      const bytes = await this.source.whole(entry.file, MOST.json, entry.bytes);
      const found = await json(bytes, MOST.inflated, entry.file);
      if (found === null || typeof found !== "object") throw new Unreadable(`${entry.file}: no object.`);
      return found;
    });
  }

  /** Keeps the latest results; a failed read is tried again. */
  #once(key, read) {
    if (!this.#kept.has(key)) {
      const found = read();
      found.catch(() => this.#kept.delete(key));
      this.#kept.set(key, found);
      const oldest = [...this.#kept.keys()].find(other => other !== "model");
      if (this.#kept.size > KEPT) this.#kept.delete(oldest);
    }
    return this.#kept.get(key);
  }
}

/** Returns the codes of deflated micro planes, or their differences, one byte each. */
export async function microCodes(stream, count) {
  const codes = await inflate(stream.bytes, "deflate", count, "the scene");
  if (codes.length !== count) throw new Unreadable(`the scene: ${codes.length} codes instead of ${count}.`);
  return new Int8Array(codes.buffer);
}

/** The 32-bit FNV-1a hash of a text's UTF-8 bytes. */
export function fnv1a(text) {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash;
}

async function verify(bytes, sha256, what) {
  if (!globalThis.crypto?.subtle) return; // absent on pages without https
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("");
  if (found !== sha256) throw new Unreadable(`${what}: damaged (its SHA-256 is another).`);
}

function checked(description) {
  const require = (holds, problem) => { if (!holds) throw new Unreadable(`published.json: ${problem}.`); };
  const isFile = entry => typeof entry?.file === "string" && PATH.test(entry.file) && isCount(entry.bytes);
  require(description?.format === FORMAT, "no published library of the format that this page reads");
  for (const key of ["packs", "pages", "weights", "names", "atlases"]) {
    require(Array.isArray(description[key]) && description[key].every(isFile), `${key} is no list of files`);
  }
  const count = description.names.length;
  require(count && !(count & (count - 1)), "names are not in a power of two of files");
  require(isFile(description.web_model), "web_model is no file");
  for (const key of ["scenes", "page_size", "thumbnail"]) {
    require(isCount(description[key]), `${key} is no number`);
  }
  const {render, library} = description;
  for (const [key, [least, most]] of Object.entries(RANGES)) {
    const value = render?.[key], holds = isCount(value) && value >= least && value <= most;
    require(holds, `render.${key} is not from ${least} to ${most}`);
  }
  const positive = value => Number.isFinite(value) && value > 0;
  const place = value => Array.isArray(value) && value.length === 3 && value.every(Number.isFinite);
  const box = library?.box, view = library?.view;
  require(place(box?.center) && place(box.half) && box.half.every(positive), "the box is none");
  require(place(view?.center) && positive(view.distance), "the view is none");
  for (const pair of [view.size, view.focal]) {
    require(Array.isArray(pair) && pair.length === 2 && pair.every(positive), "the view is none");
  }
  return description;
}
