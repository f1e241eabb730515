// The gallery of a published library: a list with search, and a page for each object. The state is in the address:
//
//   ?q=WORDS&tag=KEY=VALUE&from=60    the list, from its 61st object on
//   ?object=NAME                      an object
//
// Names and tags come from strangers. They are only ever text.

import "./latent-scene.js";
import {Unreadable} from "./source.js";
import {Entries, Search, similarRows, tagPairs} from "./search.js";

const SCREEN = 60, SIMILAR = 12;
/** Similar objects are sought without being asked for if that reads no more bytes. */
const UNASKED = 4 << 20;
/** Decoded files of thumbnails that are kept. */
const ATLASES = 8;
const TYPING = 250; // milliseconds
/** Tags that say what an object is called; without, it goes by the name of its scene. */
const NAMING = ["name", "title"];
/** Tag that is shown below the name, if the object has it; otherwise all are. */
const TELLING = "category";
/** Letters of a name on a card: two lines. */
const LETTERS = 40;
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

const status = document.getElementById("status"), view = document.getElementById("view");
const words = document.getElementById("words"), title = document.title;
const address = document.body.dataset.library ?? "./";

let library, entries, search = null;
/** Number of the newest view; what older ones find is not shown. */
let shown = 0;
/** Where the list was left. */
let list = "?";

// Elements

function make(kind, properties = {}, ...children) {
  const {data, ...others} = properties, element = Object.assign(document.createElement(kind), others);
  for (const [name, value] of Object.entries(data ?? {})) element.setAttribute(name, value);
  element.append(...children.filter(child => child !== null));
  return element;
}

/** Text of strangers, which cannot turn the direction of the text around it. */
function foreign(text) {
  return make("bdi", {textContent: String(text).replace(HIDDEN, "�")});
}

/** Leaves out the middle of a long text: names of one origin differ at their ends. */
function cut(text) {
  const letters = [...text], end = LETTERS / 2 - 1;
  return letters.length <= LETTERS ? text : `${letters.slice(0, LETTERS / 2).join("")}…${letters.slice(-end).join("")}`;
}

/** What an object is called, as [tag, text]; the tag is null for the name of its scene. */
function called(entry) {
  return tagPairs(entry.tags).find(([key, value]) => NAMING.includes(key) && value.trim()) ?? [null, entry.name];
}

function link(parameters, properties, ...children) {
  return make("a", {href: `?${new URLSearchParams(parameters)}`, ...properties}, ...children);
}

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

function fail(problem) {
  if (!(problem instanceof Unreadable)) console.error(problem);
  const text = problem instanceof Unreadable ? problem.message : "something went wrong; reload the page.";
  say(text[0].toUpperCase() + text.slice(1), true);
}

const number = value => value.toLocaleString("en-US");
const plural = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;
const bytes = count => count < 1 << 20 ? `${(count / 1024).toFixed(0)} KiB` : `${(count / 2 ** 20).toFixed(1)} MiB`;

// Thumbnails

const atlases = new Map();

/** Returns a decoded file of thumbnails. */
function atlasOf(place) {
  if (!atlases.has(place)) {
    const read = library.atlas(place).then(file => file && createImageBitmap(new Blob([file], {type: "image/webp"})));
    read.catch(() => atlases.delete(place));
    atlases.set(place, read);
    if (atlases.size > ATLASES) atlases.delete(atlases.keys().next().value);
  }
  return atlases.get(place);
}

async function drawThumbnail(canvas, {atlas, cell}) {
  const side = canvas.width = canvas.height = library.description.thumbnail;
  if (!(atlas >= 0 && cell >= 0)) return;
  const picture = await atlasOf(atlas).catch(() => null); // a card without its picture is complete
  if (!picture) return;
  const [x, y] = [side * (cell % 10), side * Math.floor(cell / 10)];
  canvas.getContext("2d").drawImage(picture, x, y, side, side, 0, 0, side, side);
}

function cards(found) {
  return make("ul", {className: "cards"}, ...found.map(entry => {
    const canvas = make("canvas", {data: {"aria-hidden": "true"}});
    drawThumbnail(canvas, entry);
    const [tag, name] = called(entry), pairs = tagPairs(entry.tags).filter(([key]) => key !== tag);
    const told = pairs.filter(([key]) => key === TELLING);
    const about = (told.length ? told : pairs).map(([, value]) => value).join(", ").slice(0, 120);
    const card = link({object: entry.name}, {className: "card"}, canvas, make("span", {}, foreign(cut(name))),
      make("small", {}, foreign(about)));
    card.dataset.name = entry.name;
    return make("li", {}, card);
  }));
}

// The list

async function showList(parameters, mine) {
  const text = parameters.get("q") ?? "", tags = parameters.getAll("tag");
  const from = Math.max(0, Math.trunc(Number(parameters.get("from")) || 0));
  list = `?${parameters}`;
  document.title = title;
  if (document.activeElement !== words) words.value = text;
  const filters = filterControls(parameters, tags), body = make("div");
  const stale = () => mine !== shown;
  view.replaceChildren(...(filters ? [filters] : []), body);
  if (!text.trim() && !tags.length) {
    const found = await entries.slice(from, SCREEN);
    if (stale()) return;
    showScreen(body, parameters, from, found, from + SCREEN < library.count);
    say(library.count ? range(from, found.length, number(library.count)) : "The library is empty.");
    return;
  }
  const key = JSON.stringify([text, tags]);
  if (search?.key !== key) search = Object.assign(new Search(entries, text, tags), {key});
  const current = search, wanted = from + SCREEN + 1;
  const progress = () => {
    if (!stale()) say(`${plural(current.found.length, "object")} so far; ${current.read} of ${current.pages} parts read …`);
  };
  await current.upTo(wanted, progress, stale);
  if (stale()) return;
  const found = current.found.slice(from, from + SCREEN), total = current.found.length;
  showScreen(body, parameters, from, found, total > from + SCREEN);
  if (!total) say("No object has these words and tags.");
  else say(range(from, found.length, current.done ? number(total) : counted(text, tags) ?? `at least ${number(total)}`));
}

/** How many objects have a single tag, as published.json counts them; null for other searches. */
function counted(text, tags) {
  if (text.trim() || tags.length !== 1) return null;
  for (const [key, values] of Object.entries(library.description.tags ?? {})) {
    for (const [value, count] of Object.entries(values ?? {})) {
      if (`${key}=${value}` === tags[0] && Number.isFinite(count)) return number(count);
    }
  }
  return null;
}

function range(from, count, total) {
  if (!from && String(count) === total) return plural(count, "object");
  return count ? `Objects ${number(from + 1)} to ${number(from + count)} of ${total}` : `No object here; there are ${total}.`;
}

function showScreen(body, parameters, from, found, more) {
  const to = (place, label) => {
    const there = new URLSearchParams(parameters);
    if (place) there.set("from", place);
    else there.delete("from");
    return link(there, {className: "button"}, label);
  };
  const earlier = from > 0 ? [to(0, "First"), to(Math.max(0, from - SCREEN), "Previous")] : [];
  const pager = make("nav", {className: "pager", data: {"aria-label": "Parts of the list"}},
    ...earlier, ...(more ? [to(from + SCREEN, "Next")] : []));
  body.replaceChildren(cards(found), pager);
}

/** A choice for each tag that published.json counts and that groups objects; null without any. */
function filterControls(parameters, tags) {
  const counts = Object.entries(library.description.tags ?? {})
    .filter(([key, values]) => groups(values) || tags.some(tag => tag.startsWith(`${key}=`)));
  if (!counts.length) return null;
  const boxes = counts.map(([key, values]) => {
    const options = Object.entries(values).map(([value, count]) => make("option", {
      value: `${key}=${value}`, selected: tags.includes(`${key}=${value}`),
      textContent: `${value} (${Number(count)})`.replace(HIDDEN, "�").slice(0, 80),
    }));
    const box = make("select", {}, make("option", {value: "", textContent: "any"}), ...options);
    box.addEventListener("change", () => {
      const there = new URLSearchParams(parameters);
      const others = tags.filter(tag => !tag.startsWith(`${key}=`));
      there.delete("tag");
      there.delete("from");
      for (const tag of box.value ? [...others, box.value] : others) there.append("tag", tag);
      go(`?${there}`);
    });
    return make("label", {}, foreign(key), box);
  });
  return make("div", {className: "filters"}, ...boxes);
}

/** Whether values of a tag divide the objects into groups: at least two, of two objects on average. */
function groups(values) {
  if (values === null || typeof values !== "object") return false;
  const counts = Object.values(values), total = counts.reduce((sum, count) => sum + Number(count), 0);
  return counts.length > 1 && total >= 2 * counts.length;
}

// An object

async function showObject(name, mine) {
  const place = await library.find(name);
  if (mine !== shown) return;
  if (!place) {
    document.title = title;
    view.replaceChildren(make("p", {}, make("a", {href: list, textContent: "All objects"})));
    say(`The library has no object “${name.slice(0, 80).replace(HIDDEN, "�")}”.`, true);
    return;
  }
  const entry = await entries.at(place.row), page = await columns(place.row);
  if (mine !== shown) return;
  const [tag, shownName] = called(entry);
  document.title = `${shownName.replace(HIDDEN, "�")} – ${title}`;
  const scene = make("latent-scene", {data: {src: address, scene: name, controls: "", autorotate: ""}});
  const heading = make("h2", {tabIndex: -1}, foreign(shownName));
  const tools = make("div", {className: "tools"}, make("a", {href: list, className: "button", textContent: "All objects"}),
    button("Copy link", () => copy(location.href)), button("Download", () => download(place, name)));
  const values = new Map();
  if (tag !== null) values.set("scene", [name]);
  for (const [key, value] of tagPairs(entry.tags)) {
    if (key !== tag) values.set(key, [...(values.get(key) ?? []), value]);
  }
  const pairs = [...values].map(([key, all]) => [foreign(key), foreign(all.join(", "))]);
  const rows = [...pairs, ...page].flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]);
  const likes = make("section", {});
  view.replaceChildren(
    make("div", {className: "object"}, make("div", {}, scene),
      make("div", {}, heading, make("dl", {}, ...rows), tools, ...useIt(name))),
    likes);
  say("");
  heading.focus({preventScroll: true});
  await offerSimilar(likes, place.row, mine);
}

/** What the index says of an object besides its tags. */
async function columns(row) {
  const size = library.description.page_size, page = await library.page(Math.floor(row / size)), at = row % size;
  const told = [];
  const add = (column, label, text) => {
    const value = page[column]?.[at];
    if (Number.isFinite(value)) told.push([label, text(value)]);
  };
  add("psnr", "PSNR", value => `${value.toFixed(2)} dB`);
  add("bytes", "file size", bytes);
  add("cpu_seconds", "learned in", value => `${value.toFixed(1)} CPU seconds`);
  const added = page.added?.[at];
  if (typeof added === "string") told.push(["added", added.slice(0, 10)]);
  return told;
}

/** How to show the object on another page, and how to export it. */
function useIt(name) {
  const folder = new URL(address, document.baseURI).href;
  const quoted = name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");
  const element = `<script type="module" src="${new URL("web/latent-scene.js", document.baseURI)}"></script>\n`
    + `<latent-scene src="${folder}" scene="${quoted}" controls></latent-scene>`;
  const shell = `'${name.replaceAll("'", "'\\''")}'`;
  const command = `latentscenes export mesh --run ${folder} --scene ${shell} --out object.glb`;
  const texts = HIDDEN.test(name) ? [element] : [element, command];
  HIDDEN.lastIndex = 0;
  return [make("h3", {textContent: "Use it"}), ...texts.map(text => make("pre", {textContent: text, tabIndex: 0}))];
}

async function offerSimilar(section, row, mine) {
  const files = library.description.weights, size = files.reduce((sum, file) => sum + file.bytes, 0);
  if (!files.length || library.count < 2) return;
  const heading = make("h3", {textContent: "Similar objects"});
  const seek = async () => {
    section.replaceChildren(heading, make("p", {textContent: "Comparing …"}));
    try {
      const rows = await similarRows(library, row, SIMILAR), found = await Promise.all(rows.map(one => entries.at(one)));
      if (mine === shown) section.replaceChildren(heading, cards(found));
    } catch (problem) {
      section.replaceChildren();
      if (mine === shown) fail(problem);
    }
  };
  if (size <= UNASKED) await seek();
  else section.replaceChildren(heading, button(`Find them (reads ${bytes(size)})`, seek));
}

function button(label, action) {
  const element = make("button", {type: "button", textContent: label});
  element.addEventListener("click", () => Promise.resolve(action()).catch(fail));
  return element;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("The link is copied.");
  } catch {
    say("The browser does not allow copying here. Copy the address of this page.", true);
  }
}

async function download(place, name) {
  const file = await library.file(place), kept = name.replace(HIDDEN, "").replace(/[\\/:*?"<>|]/g, "_").slice(0, 80);
  const target = URL.createObjectURL(new Blob([file], {type: "application/octet-stream"}));
  make("a", {href: target, download: `${kept}.safetensors`}).click();
  setTimeout(() => URL.revokeObjectURL(target), 60_000);
}

// The address and the keyboard

function go(target, replace = false) {
  history[replace ? "replaceState" : "pushState"](null, "", target);
  return show();
}

async function show(left = null) {
  const mine = ++shown, parameters = new URLSearchParams(location.search), name = parameters.get("object");
  try {
    if (name !== null) await showObject(name, mine);
    else await showList(parameters, mine);
    if (left !== null && mine === shown) {
      [...document.querySelectorAll(".card")].find(card => card.dataset.name === left)?.focus();
    }
  } catch (problem) {
    if (mine === shown) fail(problem);
  }
}

function searchNow(replace) {
  const there = new URLSearchParams(location.search);
  for (const key of ["object", "from", "q"]) there.delete(key);
  if (words.value.trim()) there.set("q", words.value.trim());
  return go(`?${there}`, replace);
}

let typing = 0;
words.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => searchNow(!new URLSearchParams(location.search).has("object")), TYPING);
});
document.getElementById("search").addEventListener("submit", event => {
  event.preventDefault();
  clearTimeout(typing);
  searchNow(false);
});
document.addEventListener("click", event => {
  const anchor = event.target instanceof Element ? event.target.closest("a[href]") : null;
  if (!anchor || anchor.hasAttribute("download") || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (!anchor.getAttribute("href").startsWith("?")) return;
  event.preventDefault();
  if (anchor.id === "home") words.value = "";
  go(anchor.getAttribute("href"));
  scrollTo(0, 0);
});
addEventListener("popstate", () => show());
document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const active = document.activeElement, writes = active?.matches("input, select, textarea");
  const object = new URLSearchParams(location.search).get("object");
  if (event.key === "/" && !writes) {
    event.preventDefault();
    words.focus();
    words.select();
  } else if (event.key === "Escape" && object !== null && !writes) {
    history.pushState(null, "", list);
    show(object);
  } else if (active?.matches(".card") && moveAmongCards(active, event.key)) {
    event.preventDefault();
  }
});

/** Moves the focus to the neighboring card; returns whether the key means one. */
function moveAmongCards(from, key) {
  const all = [...from.closest(".cards").querySelectorAll(".card")], at = all.indexOf(from);
  const top = all[0].offsetTop, line = all.filter(card => card.offsetTop === top).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -line, ArrowDown: line}[key];
  if (step === undefined) return false;
  all[at + step]?.focus();
  return true;
}

async function start() {
  const element = document.createElement("latent-scene");
  element.setAttribute("src", address);
  try {
    library = await element.library;
    entries = new Entries(library);
  } catch (problem) {
    return fail(problem);
  }
  return show();
}

start();
