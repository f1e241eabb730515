// Draws all elements of a page in turn, with one renderer. Where frames take long, moving pictures get fewer
// pixels, and sharp ones are drawn in bands, so that the page stays responsive. Pictures at rest are drawn
// twice: with one ray for each pixel, then with smooth edges.

import {cameraOf} from "./camera.js";
import {Renderer} from "./renderer.js";

/** Milliseconds that a frame may take, and after which a picture that stays still is drawn sharp. */
const LONG = 40, SHORT = 22, STILL = 200;
/** Pixels of a sharp picture at most; least share of them, along each side, for moving ones. */
const MOST_PIXELS = 1_500_000, COARSEST = 0.2;

/**
 * Draws actors. Each has `visible`, `scene`, `view`, `canvas`, `box` (CSS pixels), `advance(milliseconds)`,
 * `drawn()` and `failed(error)`.
 */
class Stage {
  #actors = new Map();
  #renderer = null;
  #scheduled = false;
  #before = null;
  #pending = null; // the last frame: {fence, since, pixels}
  #speed = 300; // pixels per millisecond
  #turn = 0;

  /** The renderer; throws Unreadable where WebGL2 is absent. */
  get renderer() {
    if (!this.#renderer) {
      this.#renderer = new Renderer();
      this.#renderer.canvas.addEventListener("webglcontextrestored", () => {
        this.#pending = null;
        for (const actor of this.#actors.keys()) this.touch(actor);
      });
    }
    return this.#renderer;
  }

  add(actor) {
    this.#actors.set(actor, {changed: -Infinity, moved: false, done: true, band: null});
  }

  remove(actor) {
    this.#actors.delete(actor);
  }

  /** Says that the picture of an actor has changed, by a motion or once. */
  touch(actor, moving = false) {
    const state = this.#actors.get(actor);
    if (!state) return;
    const changed = moving ? performance.now() : -Infinity;
    Object.assign(state, {moved: true, done: false, band: null, changed});
    this.wake();
  }

  /** Starts the loop, which ends when nothing moves. */
  wake() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(now => this.#frame(now));
  }

  #frame(now) {
    this.#scheduled = false;
    const passed = this.#before === null ? 0 : Math.min(now - this.#before, 100);
    const actors = [...this.#actors].filter(([actor]) => actor.visible && actor.scene);
    const turning = actors.filter(([actor]) => actor.advance(passed));
    for (const [actor] of turning) this.touch(actor, true);
    const waiting = actors.filter(([, state]) => !state.done);
    this.#before = waiting.length ? now : null;
    if (!waiting.length) return;
    if (this.renderer.gl.isContextLost()) return; // goes on when it is restored
    this.wake();
    if (this.#ready()) this.#draw(waiting, now);
  }

  /** Whether the graphics processor has finished the last frame; learns from its time. */
  #ready() {
    if (!this.#pending) return true;
    const {gl} = this.renderer, {fence, since, pixels} = this.#pending;
    if (gl.clientWaitSync(fence, 0, 0) === gl.TIMEOUT_EXPIRED) return false;
    gl.deleteSync(fence);
    this.#pending = null;
    if (!pixels) return true;
    const took = Math.max(1, performance.now() - since);
    // A frame that ends before the next one is due says only that more pixels would fit
    const seen = took < SHORT ? Math.max(this.#speed, pixels / took) * 1.1 : pixels / took;
    this.#speed = Math.min(1e5, 0.5 * this.#speed + 0.5 * seen);
    return true;
  }

  #draw(waiting, now) {
    const since = performance.now(), budget = this.#speed * LONG;
    const moving = waiting.filter(([, state]) => state.moved);
    let pixels = 0, counted = true;
    if (moving.length) {
      const share = Math.max(budget / moving.length, 2000), first = this.#turn++ % moving.length;
      for (let k = 0; k < moving.length && pixels < budget; k++) {
        pixels += this.#guard(moving[(first + k) % moving.length], entry => this.#coarse(entry, share));
      }
    } else {
      const still = waiting.filter(([, state]) => now - state.changed > STILL);
      const due = still.find(([, state]) => !state.band?.sharp) ?? still[0]; // edges come last
      counted = !due?.[1].band?.sharp; // how many rays edges take is not known
      if (due) pixels = this.#guard(due, entry => this.#band(entry, budget));
    }
    if (pixels) {
      const {gl} = this.renderer;
      this.#pending = {fence: gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0), since, pixels: counted ? pixels : 0};
      gl.flush();
    }
  }

  /** Draws for one actor. Errors go to it, and it is drawn no more until it changes. */
  #guard(entry, draw) {
    const [actor, state] = entry;
    try {
      return draw(entry);
    } catch (error) {
      Object.assign(state, {moved: false, done: true, band: null});
      actor.failed(error);
      return 0;
    }
  }

  #coarse([actor, state], share) {
    const full = this.#size(actor), wanted = Math.sqrt(share / (full[0] * full[1]));
    const scale = Math.min(1, Math.max(COARSEST, wanted));
    const [width, height] = full.map(side => Math.max(1, Math.round(side * scale)));
    const camera = cameraFor(actor, width, height);
    this.renderer.paint(actor.scene, camera, actor.canvas, width, height);
    state.moved = false;
    state.band = scale === 1 ? smoothed(actor) : null;
    actor.drawn();
    return width * height;
  }

  #band([actor, state], budget) {
    const [width, height] = this.#size(actor);
    state.band ??= {canvas: document.createElement("canvas"), sharp: null, from: 0};
    const {canvas, sharp, from} = state.band, camera = cameraFor(actor, width, height);
    const rows = Math.min(height - from, Math.max(8, Math.floor(budget / width)));
    this.renderer.paint(actor.scene, camera, canvas, width, height, {from, rows, sharp});
    state.band.from += rows;
    if (state.band.from >= height) {
      actor.canvas.width = width;
      actor.canvas.height = height;
      actor.canvas.getContext("2d").drawImage(canvas, 0, 0);
      actor.drawn();
      if (sharp) Object.assign(state, {done: true, band: null});
      else state.band = smoothed(actor);
    }
    return width * rows;
  }

  /** Pixels of a sharp picture. */
  #size({box: [width, height]}) {
    const scale = Math.min(devicePixelRatio || 1, Math.sqrt(MOST_PIXELS / Math.max(1, width * height)));
    return [width, height].map(side => Math.max(1, Math.round(side * scale)));
  }
}

/** The band that smooths the edges of what an actor shows. */
function smoothed({canvas}) {
  return {canvas: document.createElement("canvas"), sharp: canvas, from: 0};
}

function cameraFor({scene, view}, width, height) {
  return cameraOf(scene.view, scene.box, view, width, height);
}

export const stage = new Stage();
