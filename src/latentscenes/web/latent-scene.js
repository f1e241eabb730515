// <latent-scene>: a learned object on a page, live. One script tag loads it:
//
//   <script type="module" src="web/latent-scene.js"></script>
//   <latent-scene src="https://example.org/library" scene="chair_007" controls autorotate></latent-scene>
//
// Attributes
//   src         address of a published library (a folder with published.json)
//   scene       name of the object
//   controls    turn by dragging and arrow keys; zoom by pinching, + and −, and the wheel while focused or
//               with Ctrl; 0 resets, the space bar starts and stops turning
//   autorotate  turns by itself, so many degrees per second (18); not where reduced motion is preferred
//   poster      address of a picture to show before the object; without, the library's thumbnail; "none"
// Properties
//   view        {azimuth, elevation, zoom}; degrees, zoom 1 as in thumbnails. May be set
//   library     promise of the PublishedLibrary (library.js)
// Events
//   load        the object is drawn for the first time
//   error       `detail` says why it cannot be shown; the element shows the same text
//   change      the reader changed the view
//
// `provide(address, source)` gives a library that is on no server; its elements have this address as `src`.

import {START, tamed, thumbnailFit} from "./camera.js";
import {Scene} from "./compose.js";
import {PublishedLibrary} from "./library.js";
import {ServerSource, Unreadable} from "./source.js";
import {stage} from "./stage.js";

const DEGREES_PER_SECOND = 18, DEGREES_PER_WIDTH = 270, STEP = 10, ZOOM = 1.2;
/** Milliseconds without turning after the reader has let go. */
const PAUSE = 3000;
const still = matchMedia("(prefers-reduced-motion: reduce)");

const style = new CSSStyleSheet();
style.replaceSync(`
:host { display: block; position: relative; aspect-ratio: 4 / 3; overflow: hidden; contain: content; }
:host([hidden]) { display: none; }
canvas, img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.poster { transition: opacity 0.25s; pointer-events: none; }
.poster.past { opacity: 0; }
.handle { position: absolute; inset: 0; outline-offset: -3px; }
.handle.live { cursor: grab; touch-action: pan-y; user-select: none; -webkit-user-select: none; }
.handle.live:active { cursor: grabbing; }
.handle:focus-visible { outline: 2px solid; }
p { position: absolute; inset: auto 0 0; margin: 0; padding: 0.6em 0.9em; overflow-wrap: anywhere;
    font: 0.85rem/1.4 system-ui, sans-serif; text-align: center; }
p:empty { display: none; }
@media (prefers-reduced-motion: reduce) { .poster { transition: none; } }
`);

const libraries = new Map();

/** Gives the library of an address; without, it is read from a server. */
export function provide(address, source) {
  libraries.set(address, PublishedLibrary.open(source));
}

function libraryOf(address) {
  const key = libraries.has(address) ? address : new URL(address, document.baseURI).href;
  if (!libraries.has(key)) {
    const opened = PublishedLibrary.open(new ServerSource(key));
    opened.catch(() => libraries.delete(key)); // tried again by the next element
    libraries.set(key, opened);
  }
  return libraries.get(key);
}

const watched = new WeakMap(); // what observers call, by element
const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) watched.get(target).appear(isIntersecting);
}, {rootMargin: "100px"});
const sized = new ResizeObserver(entries => {
  for (const {target, contentRect: {width, height}} of entries) watched.get(target).resize([width, height]);
});

export class LatentScene extends HTMLElement {
  static observedAttributes = ["src", "scene", "controls", "autorotate", "poster"];
  #parts = {};
  #load = 0; // number of the newest load
  #loaded = false;
  #view = {...START};
  #rest = -Infinity; // when the reader let go
  #held = false;
  #spinning = null; // by the space bar; null: as the attribute says
  #actor; // what the stage draws

  constructor() {
    super();
    const root = this.attachShadow({mode: "open"}), make = kind => document.createElement(kind);
    root.adoptedStyleSheets = [style];
    const canvas = make("canvas"), poster = make("canvas"), handle = make("div"), message = make("p");
    poster.className = "poster";
    handle.className = "handle";
    handle.setAttribute("role", "img");
    message.setAttribute("role", "status");
    root.append(canvas, poster, handle, message);
    this.#parts = {canvas, poster, handle, message};
    const element = this;
    this.#actor = {
      canvas, scene: null, visible: false, box: [1, 1],
      get view() { return element.#view; },
      advance: milliseconds => this.#advance(milliseconds),
      drawn: () => this.#drawn(),
      failed: problem => this.#failed(problem),
    };
    watched.set(this, {appear: visible => this.#appear(visible), resize: box => this.#resize(box)});
    this.#listen(handle);
  }

  connectedCallback() {
    stage.add(this.#actor);
    seen.observe(this);
    sized.observe(this);
    this.#restart();
  }

  disconnectedCallback() {
    this.#load++;
    this.#actor.visible = false;
    stage.remove(this.#actor);
    seen.unobserve(this);
    sized.unobserve(this);
  }

  attributeChangedCallback(name) {
    if (!this.isConnected) return;
    if (name === "controls") this.#label();
    else if (name === "autorotate") stage.wake();
    else this.#restart();
  }

  get view() {
    return {...this.#view};
  }

  set view(value) {
    this.#view = tamed({...this.#view, ...value});
    stage.touch(this.#actor, true);
  }

  get library() {
    return libraryOf(this.getAttribute("src") ?? "");
  }

  // Called by observers and the stage

  #appear(visible) {
    this.#actor.visible = visible;
    if (visible && !this.#loaded) this.#start();
    if (visible) stage.wake();
  }

  #resize(box) {
    this.#actor.box = box;
    stage.touch(this.#actor, true);
  }

  /** Turns on; returns whether the view changed. */
  #advance(milliseconds) {
    const wanted = this.#spinning ?? (this.hasAttribute("autorotate") && !still.matches);
    const pausing = this.#spinning === null && performance.now() - this.#rest < PAUSE;
    if (!wanted || this.#held || pausing) return false;
    const speed = parseFloat(this.getAttribute("autorotate")) || DEGREES_PER_SECOND;
    this.#view = tamed({...this.#view, azimuth: this.#view.azimuth + speed * milliseconds / 1000});
    return true;
  }

  #drawn() {
    if (this.#loaded !== "drawn") {
      this.#loaded = "drawn";
      this.#parts.poster.classList.add("past");
      this.dispatchEvent(new Event("load"));
    }
  }

  #failed(problem) {
    if (!(problem instanceof Unreadable)) console.error(problem);
    const text = problem instanceof Unreadable ? problem.message : "the object cannot be drawn.";
    this.#actor.scene = null;
    this.#parts.message.textContent = text[0].toUpperCase() + text.slice(1);
    this.dispatchEvent(new CustomEvent("error", {detail: text}));
  }

  // Loading

  #restart() {
    this.#load++;
    this.#loaded = false;
    this.#actor.scene = null;
    this.#parts.message.textContent = "";
    for (const canvas of [this.#parts.canvas, this.#parts.poster]) canvas.width = canvas.height = 1;
    this.#parts.poster.classList.remove("past");
    this.#label();
    if (this.#actor.visible) this.#start();
  }

  async #start() {
    this.#loaded = true;
    const load = ++this.#load, name = this.getAttribute("scene"), src = this.getAttribute("src");
    try {
      if (!src || !name) throw new Unreadable("write the attributes src (a library) and scene (a name).");
      const library = await libraryOf(src), place = await library.find(name);
      if (!place) throw new Unreadable(`the library has no object “${name.slice(0, 80)}”.`);
      if (load !== this.#load) return;
      this.#showPoster(library, place, load);
      stage.renderer; // fails before anything is read where WebGL2 is absent
      const scene = await Scene.read(library, place, name);
      if (load !== this.#load) return;
      this.#actor.scene = scene;
      stage.touch(this.#actor);
    } catch (problem) {
      if (load === this.#load) this.#failed(problem);
    }
  }

  async #showPoster(library, place, load) {
    const {poster} = this.#parts, given = this.getAttribute("poster");
    if (given === "none") return;
    try {
      const picture = given ? await pictureAt(given) : await library.thumbnail(place);
      if (load !== this.#load || !picture) return;
      [poster.width, poster.height] = [picture.width, picture.height];
      poster.getContext("2d").drawImage(picture, 0, 0);
      const {view, box} = library.description.library;
      poster.style.transform = given ? "" : `scale(${thumbnailFit(view, box, ...this.#actor.box)})`;
    } catch {
      // An object without its poster is complete
    }
  }

  #label() {
    const {handle} = this.#parts, live = this.hasAttribute("controls");
    const name = this.getAttribute("scene") ?? "";
    handle.classList.toggle("live", live);
    handle.setAttribute("aria-label", live ? `${name}: turn it with the arrow keys` : name);
    if (live) handle.tabIndex = 0;
    else handle.removeAttribute("tabindex");
  }

  // Hands of the reader

  #listen(handle) {
    const fingers = new Map();
    const apart = () => {
      const [first, second] = [...fingers.values()];
      return Math.hypot(first.clientX - second.clientX, first.clientY - second.clientY);
    };
    handle.addEventListener("pointerdown", event => {
      if (event.button || !this.hasAttribute("controls")) return;
      fingers.set(event.pointerId, event);
      handle.setPointerCapture(event.pointerId);
      this.#held = true;
    });
    handle.addEventListener("pointermove", event => {
      const last = fingers.get(event.pointerId);
      if (!last) return;
      const before = fingers.size === 2 ? apart() : 0;
      fingers.set(event.pointerId, event);
      if (fingers.size === 2) {
        this.#change({zoom: this.#view.zoom * apart() / Math.max(1, before)});
      } else if (fingers.size === 1) {
        const degrees = DEGREES_PER_WIDTH / Math.max(1, Math.min(...this.#actor.box));
        this.#change({azimuth: this.#view.azimuth - (event.clientX - last.clientX) * degrees,
                      elevation: this.#view.elevation + (event.clientY - last.clientY) * degrees / 2});
      }
    });
    for (const end of ["pointerup", "pointercancel"]) {
      handle.addEventListener(end, event => {
        fingers.delete(event.pointerId);
        this.#held = fingers.size > 0;
        this.#rest = performance.now();
        stage.wake();
      });
    }
    handle.addEventListener("keydown", event => this.#key(event));
    handle.addEventListener("wheel", event => {
      if (!this.hasAttribute("controls") || !(event.ctrlKey || this.shadowRoot.activeElement)) return;
      event.preventDefault();
      const turned = Math.max(-60, Math.min(60, event.deltaY));
      this.#change({zoom: this.#view.zoom * Math.exp(-turned / 400)});
    }, {passive: false});
  }

  #key(event) {
    if (!this.hasAttribute("controls") || event.altKey || event.ctrlKey || event.metaKey) return;
    const {azimuth, elevation, zoom} = this.#view;
    const changes = {
      ArrowLeft: {azimuth: azimuth + STEP}, ArrowRight: {azimuth: azimuth - STEP},
      ArrowUp: {elevation: elevation + STEP}, ArrowDown: {elevation: elevation - STEP},
      "+": {zoom: zoom * ZOOM}, "=": {zoom: zoom * ZOOM}, "-": {zoom: zoom / ZOOM}, 0: START,
    };
    if (event.key === " ") {
      this.#spinning = !(this.#spinning ?? (this.hasAttribute("autorotate") && !still.matches));
      stage.touch(this.#actor, true);
    } else if (Object.hasOwn(changes, event.key)) {
      this.#change(changes[event.key]);
    } else {
      return;
    }
    event.preventDefault();
  }

  #change(part) {
    this.#rest = performance.now();
    this.view = part;
    this.dispatchEvent(new CustomEvent("change", {detail: this.view}));
  }
}

async function pictureAt(address) {
  const picture = new Image();
  picture.src = new URL(address, document.baseURI).href;
  await picture.decode();
  return picture;
}

if (!customElements.get("latent-scene")) customElements.define("latent-scene", LatentScene);
