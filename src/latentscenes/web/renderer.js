// Draws scenes with WebGL2: one drawing buffer for all pictures of a page.

import {CELLS, EDGE, EMPTY, MATTER, TILES, VERTEX, WHITE} from "./shader.js";
import {packNetwork, probeShader, sizes, viewShader} from "./shader.js";
import {Unreadable} from "./source.js";

/**
 * Opacities up to the first are haze, those from the second on are solid (see model/pictures.py). With CLEAN,
 * white matter around the object is left out, too; fields grow it if they learn without silhouettes.
 */
export const CLEAN = [0.1, 0.9], RAW = [0, 1];
/** Largest opacity of a cell that counts as empty, as in rendering/occupancy.py. */
const CLEAR = 1e-3;
/** Least byte of each channel of white, as in data/images.py. */
const LEAST_WHITE = 250;
/** Bytes of planes that stay in the memory of the graphics processor, in sum over scenes. */
const MOST_BYTES = 2 ** 28;
/** Places in a pixel, from its middle, whose rays color an edge together: one in each row and column of 8. */
const RAYS = [[-2, -6], [6, -2], [2, 6], [-6, 2]].map(at => at.map(k => k / 16));
const PLANES = 0, GRID = 1, SHARP = 2;

export class Renderer {
  #most;
  #programs = new Map();
  #scenes = new Map();
  #sharp = null; // the picture whose edges are smoothed: {canvas, texture}

  /** Throws Unreadable where WebGL2 is absent. */
  constructor(most = MOST_BYTES) {
    this.#most = most;
    this.canvas = document.createElement("canvas");
    const settings = {alpha: true, premultipliedAlpha: true, antialias: false, depth: false};
    this.gl = this.canvas.getContext("webgl2", settings);
    if (!this.gl) throw new Unreadable("this browser has no WebGL2, which is needed to turn the object.");
    this.canvas.addEventListener("webglcontextlost", event => event.preventDefault()); // asks for another
    this.canvas.addEventListener("webglcontextrestored", () => {
      this.#scenes.clear();
      this.#programs.clear();
      this.#sharp = null;
    });
  }

  /**
   * Draws a picture into the lower left corner of the canvas.
   *
   * camera: {axes: 3 × 3 numbers, columns right, down and forward, column after column; eye: world; lens: fx,
   * fy, cx, cy as fractions}.
   * haze: CLEAN or RAW.
   * from, rows: the band of rows to draw, from the top; by default all.
   */
  draw(scene, camera, width, height, {haze = CLEAN, from = 0, rows = height} = {}) {
    const at = this.#prepare(scene, camera, width, height, {haze, from, rows});
    this.gl.uniform1i(at("smoothing"), 0);
    this.gl.drawArrays(this.gl.TRIANGLES, 0, 3);
  }

  /**
   * Draws a picture, or a band of it, once more with smooth edges: a pixel that differs from a neighbor becomes
   * the mean of several rays.
   *
   * sharp: the whole picture, as `paint` has left it on a canvas. It is read for the first band.
   */
  smooth(scene, camera, sharp, width, height, {haze = CLEAN, from = 0, rows = height} = {}) {
    const {gl} = this, at = this.#prepare(scene, camera, width, height, {haze, from, rows});
    if (from === 0 || this.#sharp?.canvas !== sharp) this.#keep(sharp);
    gl.activeTexture(gl.TEXTURE0 + SHARP);
    gl.bindTexture(gl.TEXTURE_2D, this.#sharp.texture);
    gl.blendFunc(gl.CONSTANT_ALPHA, gl.ONE_MINUS_CONSTANT_ALPHA);
    RAYS.forEach(([right, up], k) => {
      if (k) gl.enable(gl.BLEND); // the mean of all rays so far
      gl.blendColor(0, 0, 0, 1 / (k + 1));
      gl.uniform1i(at("smoothing"), k + 1);
      gl.uniform2f(at("corner"), -right, -up);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    });
    gl.disable(gl.BLEND);
    if (from + rows >= height) this.#keep(null);
  }

  /** Takes over a canvas as a texture, the lowest row first, in place of the one before. */
  #keep(canvas) {
    const {gl} = this, texture = canvas && gl.createTexture();
    if (this.#sharp) gl.deleteTexture(this.#sharp.texture);
    this.#sharp = canvas && {canvas, texture};
    if (!canvas) return;
    const settings = [gl.UNPACK_FLIP_Y_WEBGL, gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL];
    gl.activeTexture(gl.TEXTURE0 + SHARP);
    gl.bindTexture(gl.TEXTURE_2D, texture);
    for (const setting of settings) gl.pixelStorei(setting, true);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, canvas);
    for (const setting of settings) gl.pixelStorei(setting, false);
    smooth(gl, gl.TEXTURE_2D, gl.NEAREST);
  }

  /** Sets all that the program reads for a band of a picture; returns the places of its uniforms. */
  #prepare(scene, camera, width, height, {haze, from, rows}) {
    const {gl, canvas} = this, held = this.#held(scene), {program, at} = held.view;
    if (canvas.width < width) canvas.width = width;
    if (canvas.height < height) canvas.height = height;
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, height - from - rows, width, rows);
    gl.useProgram(program);
    this.#bind(held);
    gl.uniform2f(at("corner"), 0, 0);
    gl.uniform2f(at("pixels"), width, height);
    gl.uniform4fv(at("lens"), camera.lens);
    gl.uniformMatrix3fv(at("axes"), false, camera.axes);
    gl.uniform3fv(at("eye"), camera.eye);
    gl.uniform3fv(at("center"), scene.box.center);
    gl.uniform3fv(at("halfSides"), scene.box.half);
    gl.uniform1f(at("unit"), scene.unit);
    const {near, far} = scene.render;
    gl.uniform2f(at("bounds"), (near ?? 0) / scene.unit, (far ?? 0) / scene.unit);
    gl.uniform2fv(at("haze"), haze);
    gl.uniform1i(at("clean"), haze === RAW || scene.silhouettes ? 0 : 1);
    return at;
  }

  /**
   * Draws a picture, or a band of it, and copies it onto a canvas, which takes the picture's size.
   *
   * sharp: a canvas with the same picture, whose edges are smoothed.
   */
  paint(scene, camera, target, width, height, {from = 0, rows = height, sharp = null} = {}) {
    if (sharp) this.smooth(scene, camera, sharp, width, height, {from, rows});
    else this.draw(scene, camera, width, height, {from, rows});
    if (target.width !== width) target.width = width;
    if (target.height !== height) target.height = height;
    const context = target.getContext("2d"), top = this.canvas.height - height + from;
    context.clearRect(0, from, width, rows);
    context.drawImage(this.canvas, 0, top, width, rows, 0, from, width, rows);
  }

  /** Returns the picture that was just drawn: premultiplied RGBA bytes, the lowest row first. */
  pixels(width, height) {
    const found = new Uint8Array(4 * width * height);
    this.gl.readPixels(0, 0, width, height, this.gl.RGBA, this.gl.UNSIGNED_BYTE, found);
    return found;
  }

  /** Share of the grid's cells that may hold matter. */
  occupancy(scene) {
    return this.#held(scene).occupancy;
  }

  /** Textures and network of a scene, uploaded at first use; the least recently drawn scene goes. */
  #held(scene) {
    const known = this.#scenes.get(scene);
    this.#scenes.delete(scene);
    const held = known ?? this.#upload(scene);
    this.#scenes.set(scene, held);
    let bytes = [...this.#scenes.values()].reduce((sum, other) => sum + other.bytes, 0);
    for (const [other, {bytes: freed}] of this.#scenes) {
      if (bytes <= this.#most) break;
      this.#drop(other);
      bytes -= freed;
    }
    return held;
  }

  #drop(scene) {
    const {planes, grid, network} = this.#scenes.get(scene);
    this.#scenes.delete(scene);
    for (const texture of [planes, grid]) this.gl.deleteTexture(texture);
    this.gl.deleteBuffer(network);
  }

  #upload(scene) {
    const {gl} = this, {render} = scene, depth = 3 * sizes(render).groups, side = render.resolution + 2;
    const bytes = 8 * depth * side ** 2, planes = gl.createTexture();
    if (bytes > this.#most) {
      const [needed, most] = [bytes, this.#most].map(size => Math.ceil(size / 2 ** 20));
      throw new Unreadable(`the planes of this object take ${needed} MiB of graphics memory; ${most} are allowed.`);
    }
    gl.bindTexture(gl.TEXTURE_2D_ARRAY, planes);
    gl.texStorage3D(gl.TEXTURE_2D_ARRAY, 1, gl.RGBA16F, side, side, depth);
    gl.texSubImage3D(gl.TEXTURE_2D_ARRAY, 0, 0, 0, 0, side, side, depth, gl.RGBA, gl.FLOAT, scene.planes());
    smooth(gl, gl.TEXTURE_2D_ARRAY, gl.LINEAR);
    const network = gl.createBuffer();
    gl.bindBuffer(gl.UNIFORM_BUFFER, network);
    gl.bufferData(gl.UNIFORM_BUFFER, packNetwork(render, scene.network), gl.STATIC_DRAW);
    const held = {planes, bytes, network, grid: null, view: this.#program(render, viewShader)};
    return Object.assign(held, this.#fillGrid(scene, held));
  }

  /** Finds the cells that may hold matter: those with density in or next to them. */
  #fillGrid(scene, held) {
    const {gl} = this, target = gl.createTexture(), frame = gl.createFramebuffer();
    const width = CELLS * TILES, height = CELLS * CELLS / TILES, found = new Uint8Array(4 * width * height);
    gl.bindTexture(gl.TEXTURE_2D, target);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA8, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, target, 0);
    gl.viewport(0, 0, width, height);
    const {program, at} = this.#program(scene.render, probeShader), side = 2 * Math.max(...scene.box.half) / CELLS;
    gl.useProgram(program);
    gl.uniform1f(at("least"), -Math.log1p(-CLEAR) * scene.unit / side);
    this.#bind(held);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, found);
    gl.deleteFramebuffer(frame);
    gl.deleteTexture(target);
    const cells = sorted(found, scene), grid = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, grid);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.R8, width, height);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, width, height, gl.RED, gl.UNSIGNED_BYTE, cells);
    smooth(gl, gl.TEXTURE_2D, gl.NEAREST);
    return {grid, occupancy: cells.reduce((sum, value) => sum + (value > WHITE), 0) / cells.length};
  }

  #bind({planes, grid, network}) {
    const {gl} = this;
    gl.activeTexture(gl.TEXTURE0 + PLANES);
    gl.bindTexture(gl.TEXTURE_2D_ARRAY, planes);
    gl.activeTexture(gl.TEXTURE0 + GRID);
    gl.bindTexture(gl.TEXTURE_2D, grid);
    gl.bindBufferBase(gl.UNIFORM_BUFFER, 0, network);
  }

  /** Compiles a program, once for all scenes of the same sizes. */
  #program(render, shader) {
    const {gl} = this, source = shader(render);
    if (this.#programs.has(source)) return this.#programs.get(source);
    const program = gl.createProgram(), places = new Map();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, source]]) {
      const part = gl.createShader(kind);
      gl.shaderSource(part, text);
      gl.compileShader(part);
      gl.attachShader(program, part);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
      const logs = gl.getAttachedShaders(program).map(part => gl.getShaderInfoLog(part));
      console.warn(gl.getProgramInfoLog(program), ...logs);
      throw new Unreadable("the graphics processor cannot compile the renderer for this library.");
    }
    gl.useProgram(program);
    gl.uniformBlockBinding(program, gl.getUniformBlockIndex(program, "Network"), 0);
    gl.uniform1i(gl.getUniformLocation(program, "planes"), PLANES);
    gl.uniform1i(gl.getUniformLocation(program, "grid"), GRID);
    gl.uniform1i(gl.getUniformLocation(program, "sharp"), SHARP);
    const at = name => {
      if (!places.has(name)) places.set(name, gl.getUniformLocation(program, name));
      return places.get(name);
    };
    this.#programs.set(source, {program, at});
    return this.#programs.get(source);
  }
}

function smooth(gl, target, filter) {
  for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(target, side, filter);
  for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(target, side, gl.CLAMP_TO_EDGE);
}

/** Sorts the cells of the grid, from the picture that the probe shader draws. */
function sorted(found, {render}) {
  const count = CELLS ** 3, cells = new Uint8Array(count);
  if (render.view_direction) return cells.fill(MATTER); // density depends on the side it is seen from
  const dense = new Uint8Array(count), solid = new Uint8Array(count);
  const open = new Uint8Array(count); // cells that the space around the object may reach
  for (let k = 0; k < count; k++) {
    dense[k] = Number(found[4 * k] > 127);
    const [red, green, blue] = found.subarray(4 * k + 1, 4 * k + 4);
    open[k] = Number(!dense[k] || Math.min(red, green, blue) >= LEAST_WHITE);
  }
  const around = flooded(open);
  for (let k = 0; k < count; k++) solid[k] = Number(dense[k] && !around[k]);
  const nearDense = grown(dense), nearSolid = grown(solid), nearAround = grown(around);
  for (let k = 0; k < count; k++) {
    cells[k] = nearSolid[k] ? (nearAround[k] ? EDGE : MATTER) : nearDense[k] ? WHITE : EMPTY;
  }
  return cells;
}

/** The index of a cell in the grid's picture. */
function place(x, y, z) {
  return ((Math.floor(z / TILES) * CELLS + y) * TILES + z % TILES) * CELLS + x;
}

/** Returns the cells that are connected with the grid's border through open ones. */
function flooded(open) {
  const reached = new Uint8Array(open.length), found = new Int32Array(open.length);
  let end = 0;
  const reach = (x, y, z) => {
    if (Math.min(x, y, z) < 0 || Math.max(x, y, z) >= CELLS) return;
    const k = place(x, y, z);
    if (reached[k] || !open[k]) return;
    reached[k] = 1;
    found[end++] = (z * CELLS + y) * CELLS + x;
  };
  for (let a = 0; a < CELLS; a++) {
    for (let b = 0; b < CELLS; b++) {
      for (const c of [0, CELLS - 1]) {
        reach(a, b, c);
        reach(a, c, b);
        reach(c, a, b);
      }
    }
  }
  for (let k = 0; k < end; k++) {
    const [x, y, z] = [1, CELLS, CELLS ** 2].map(step => Math.floor(found[k] / step) % CELLS);
    for (const step of [-1, 1]) {
      reach(x + step, y, z);
      reach(x, y + step, z);
      reach(x, y, z + step);
    }
  }
  return reached;
}

/** Returns the cells that are marked or have a marked neighbor, corners included. */
function grown(marked) {
  const cells = marked.slice();
  for (const at of [(a, b, c) => place(c, a, b), (a, b, c) => place(a, c, b), (a, b, c) => place(a, b, c)]) {
    for (let a = 0; a < CELLS; a++) {
      for (let b = 0; b < CELLS; b++) {
        let before = 0, own = cells[at(a, b, 0)];
        for (let c = 0; c < CELLS; c++) {
          const after = c + 1 < CELLS ? cells[at(a, b, c + 1)] : 0;
          cells[at(a, b, c)] = before | own | after;
          before = own;
          own = after;
        }
      }
    }
  }
  return cells;
}
