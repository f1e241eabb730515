// Objects of a published library by name, by tag, and by likeness. Files are read as far as they are needed.

import {basesOf} from "./compose.js";
import {Unreadable} from "./source.js";

/** Files that are read at a time. */
const TOGETHER = 4;

/** The entries of the index, in the order of addition. */
export class Entries {
  #pages = new Map();

  constructor(library) {
    this.library = library;
  }

  /** Returns the entries of a page: {row, name, tags, atlas, cell}; tags is an object. */
  page(number) {
    if (!this.#pages.has(number)) {
      const read = this.library.page(number).then(page => this.#entries(number, page));
      read.catch(() => this.#pages.delete(number)); // tried again
      this.#pages.set(number, read);
    }
    return this.#pages.get(number);
  }

  #entries(number, {name, tags, atlas, cell}) {
    const first = number * this.library.description.page_size;
    return name.map((text, k) => ({
      row: first + k, name: String(text), tags: plainTags(tags?.[k]), atlas: atlas?.[k], cell: cell?.[k],
    }));
  }

  /** Returns the entry of a row. */
  async at(row) {
    const size = this.library.description.page_size, page = await this.page(Math.floor(row / size));
    const found = page[row % size];
    if (!found) throw new Unreadable("the index is incomplete. The library must be published again.");
    return found;
  }

  /** Returns up to `count` entries from a row on. */
  async slice(from, count) {
    const size = this.library.description.page_size, end = Math.min(from + count, this.library.count), found = [];
    for (let page = Math.floor(from / size); page * size < end; page++) {
      const entries = await this.page(page);
      found.push(...entries.slice(Math.max(0, from - page * size), end - page * size));
    }
    return found;
  }
}

/** The entries that hold all words, in the name or in values of tags, and have all tags ("key=value"). */
export class Search {
  /** Entries found so far: an object of exactly this name first, then the order of addition. */
  found = [];
  /** Pages read so far. */
  read = 0;
  #exact = null;
  #begun = false;

  constructor(entries, text, tags) {
    this.entries = entries;
    this.text = text.trim();
    this.words = folded(this.text).split(/\s+/).filter(Boolean);
    this.tags = tags;
    this.pages = entries.library.description.pages.length;
  }

  get done() {
    return this.read >= this.pages;
  }

  /** Reads on until `count` entries are found, all pages are read, or `stopped` returns true. */
  async upTo(count, progress, stopped) {
    if (!this.#begun) {
      this.#begun = true;
      const place = this.text && !this.tags.length ? await this.entries.library.find(this.text) : null;
      if (place) this.found.push(this.#exact = await this.entries.at(place.row));
      progress();
    }
    while (!this.done && this.found.length < count && !stopped()) {
      const next = Array.from({length: Math.min(TOGETHER, this.pages - this.read)}, (_, k) => this.read + k);
      const pages = await Promise.all(next.map(page => this.entries.page(page)));
      if (stopped()) return;
      for (const page of pages) this.found.push(...page.filter(entry => this.#holds(entry)));
      this.read += next.length;
      progress();
    }
  }

  #holds(entry) {
    if (entry.row === this.#exact?.row) return false;
    const pairs = tagPairs(entry.tags);
    if (!this.tags.every(tag => pairs.some(([key, value]) => `${key}=${value}` === tag))) return false;
    const text = folded([entry.name, ...pairs.map(([, value]) => value)].join("\n"));
    return this.words.every(word => text.includes(word));
  }
}

/** Returns [key, value] for every value of an entry's tags, as text. */
export function tagPairs(tags) {
  return Object.entries(tags).flatMap(([key, value]) =>
    (Array.isArray(value) ? value : [value])
      .filter(one => ["string", "number", "boolean"].includes(typeof one)).map(one => [key, String(one)]));
}

/** Returns the rows of the `count` objects most similar to the one of a row, nearest first: those whose macro planes
    differ least (√((v − w)ᵀ G (v − w)), where G holds the products of the base planes). */
export async function similarRows(library, row, count) {
  const {page_size: size, weights} = library.description, {bases} = library.render;
  const home = await library.weights(Math.floor(row / size));
  if (!home) return [];
  const own = home.slice((row % size) * bases, (row % size + 1) * bases);
  if (own.length !== bases) throw new Unreadable("the weights are incomplete. The library must be published again.");
  const products = await productsOf(library);
  let nearest = [];
  for (let first = 0; first < weights.length; first += TOGETHER) {
    const numbers = Array.from({length: Math.min(TOGETHER, weights.length - first)}, (_, k) => first + k);
    const tables = await Promise.all(numbers.map(page => library.weights(page)));
    tables.forEach((table, k) => {
      for (let scene = 0; scene * bases < table.length; scene++) {
        const other = numbers[k] * size + scene;
        if (other !== row) nearest.push({row: other, distance: distance(table, scene * bases, own, products)});
      }
      nearest = nearest.sort((a, b) => a.distance - b.distance || a.row - b.row).slice(0, count);
    });
  }
  return nearest.map(one => one.row);
}

function distance(table, start, own, products) {
  const bases = own.length, offset = own.map((value, k) => table[start + k] - value);
  let sum = 0;
  for (let i = 0; i < bases; i++) {
    let line = 0;
    for (let j = 0; j < bases; j++) line += products[i * bases + j] * offset[j];
    sum += offset[i] * line;
  }
  return sum;
}

const computed = new WeakMap();

/** Returns the products of the base planes with one another, bases × bases; computed once. */
function productsOf(library) {
  if (!computed.has(library)) {
    const found = products(library);
    found.catch(() => computed.delete(library));
    computed.set(library, found);
  }
  return computed.get(library);
}

async function products(library) {
  const {bases} = library.render, base = basesOf(await library.model(), library.render);
  const found = new Float64Array(bases * bases);
  for (let i = 0; i < bases; i++) {
    const plane = base(i), {length} = plane;
    for (let j = 0; j <= i; j++) {
      const other = base(j);
      let sum = 0;
      for (let k = 0; k < length; k++) sum += plane[k] * other[k];
      found[i * bases + j] = found[j * bases + i] = sum / length;
    }
    await new Promise(resolve => setTimeout(resolve)); // the page stays alive
  }
  return found;
}

function plainTags(tags) {
  return tags !== null && typeof tags === "object" && !Array.isArray(tags) ? tags : {};
}

function folded(text) {
  return text.normalize("NFKC").toLowerCase();
}
