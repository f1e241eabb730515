// A scene as it is rendered: fused tri-planes in the layout of textures, and the network that reads them.
// The same sums as model/planes.py and rendering/field.py.

import {microCodes} from "./library.js";
import {Unreadable} from "./source.js";
import {floats, tensorOf} from "./tensors.js";

/** A scene of a library. It keeps what was read; `planes` is computed when it is needed. */
export class Scene {
  /** Reads a scene. Throws Unreadable if the library has none of that name, or it cannot be shown. */
  static async read(library, place, name) {
    refuseOthers(library.render);
    const [model, tensors] = await Promise.all([library.model(), library.tensors(place)]);
    return new Scene(library, model, await ownParts(library.render, tensors), name);
  }

  constructor(library, model, own, name) {
    this.render = library.render;
    /** Whether opacity says where the object is, so that white matter is of the object. */
    this.silhouettes = library.description.silhouettes === true;
    this.name = name;
    this.own = own;
    this.model = model;
    const {box, view} = library.description.library;
    this.box = own.box ? {center: own.box.slice(0, 3), half: own.box.slice(3)} : box;
    if (!this.box.half.every(side => side > 0)) throw new Unreadable("the scene: its box has no volume.");
    /** The unit of length along rays, world units (see rendering/render.py). */
    this.unit = own.box ? size(this.box.half) / size(box.half) : 1;
    this.view = own.box ? viewAround(view, this.box) : view;
  }

  /** Weights and biases of the field. */
  get network() {
    return fieldOf(this.render, this.model);
  }

  /**
   * Returns the planes as layers of RGBA texels: layer 3 g + p holds values 4 g to 4 g + 3 of plane p. Values
   * are the fused and mixed features; where planes are summed, the hidden layer's products with them, without
   * bias. Each layer has r + 2 texels a side; the outermost are zero, as is all space outside the planes.
   */
  planes() {
    const {resolution: side, micro, fusion} = this.render, features = featuresOf(this.render);
    const macro = this.#macro(), {micro: own, mixing} = this.own, wide = macro ? this.render.macro : 0;
    const shift = micro && wide && fusion === "concat" ? micro : 0;
    const texels = new Float32Array(3 * side * side * features);
    for (let k = 0; k < 3 * side * side; k++) {
      for (let m = 0; own && m < micro; m++) texels[k * features + m] = own[k * micro + m];
      for (let g = 0; g < wide; g++) texels[k * features + shift + g] += macro[k * wide + g];
    }
    const matrix = this.render.aggregation === "sum" ? folded(this.network, mixing, features)
      : mixing && withIdentity(mixing, features);
    if (!matrix) return layers(texels, side, features);
    return layers(multiplied(texels, matrix, features), side, matrix.length / features);
  }

  /** Σ weights · bases + bias, channels last; null without base planes. */
  #macro() {
    const {weights, bias} = this.own, {resolution: side, macro, bases} = this.render;
    if (!weights) return null;
    const base = basesOf(this.model, this.render), count = 3 * side * side * macro;
    const sum = new Float32Array(count).fill(bias ? bias[0] : 0);
    for (let k = 0; k < bases; k++) {
      const numbers = base(k), weight = weights[k];
      for (let j = 0; j < count; j++) sum[j] += weight * numbers[j];
    }
    return sum;
  }
}

/** Returns a function that gives the numbers of a base, channels last. */
export function basesOf(model, {bases, resolution: side, macro}) {
  const stored = tensorOf(model, "bases", [bases, 3, side, side, macro], "the model"), count = 3 * side * side * macro;
  if (stored.kind !== "I8") { // published by an earlier version
    const numbers = floats(stored);
    return k => numbers.subarray(k * count, (k + 1) * count);
  }
  const steps = floats(tensorOf(model, "bases.scale", [bases, 3, macro], "the model"));
  const codes = new Int8Array(stored.bytes.buffer, stored.bytes.byteOffset, stored.bytes.length);
  return k => {
    const found = new Float32Array(count);
    for (let p = 0, j = 0; p < 3; p++) {
      const start = (3 * k + p) * macro, end = (p + 1) * side * side * macro;
      for (let g = 0; j < end; j++, g = g + 1 === macro ? 0 : g + 1) found[j] = codes[k * count + j] * steps[start + g];
    }
    return found;
  };
}

/** Number of features of fused planes. */
export function featuresOf({micro, macro, fusion}) {
  return fusion === "concat" ? micro + macro : Math.max(micro, macro);
}

function refuseOthers(render) {
  const {codec, normalizer, aggregation, axes, fusion} = render;
  if (!["identity", "guided"].includes(codec?.kind)) {
    throw new Unreadable(`this page cannot show scenes of the codec “${String(codec?.kind).slice(0, 40)}”: ` +
                         "its latents are no colors. Ask for pictures or a mesh of the scene.");
  }
  if (normalizer !== "none") throw new Unreadable("this page cannot show scenes with normalized latents.");
  const known = ["sum", "product"].includes(aggregation) && ["xy,xz,yz", "eg3d"].includes(axes);
  if (!known || !["concat", "sum"].includes(fusion)) {
    throw new Unreadable("this page is of an earlier version than the library: it does not know its planes.");
  }
  if (!featuresOf(render)) throw new Unreadable("published.json: the planes have no features.");
}

/** What a scene stores, as numbers; micro planes channels last. */
async function ownParts(render, tensors) {
  const {resolution: side, micro, macro} = render, bases = macro ? render.bases : 0, what = "the scene";
  const mixed = render.mixing ? featuresOf(render) : 0;
  const numbers = (name, shape) => {
    const found = tensorOf(tensors, name, shape, what);
    return found && finite(floats(found), name);
  };
  let planes = null;
  const differences = tensors.get("micro.differences.stream"), stream = differences ?? tensors.get("micro.stream");
  if (stream) {
    const scale = numbers("micro.scale", [3, micro]), count = 3 * side * side * micro;
    const codes = await microCodes(stream, count);
    if (differences) summed(codes, side);
    planes = new Float32Array(count);
    for (let p = 0, k = 0; p < 3; p++) {
      for (let m = 0; m < micro; m++) {
        const step = scale[p * micro + m];
        for (let place = p * side * side; place < (p + 1) * side * side; place++) {
          planes[place * micro + m] = codes[k++] * step;
        }
      }
    }
  } else {
    planes = numbers("micro", [3, side, side, micro]);
  }
  const box = tensors.has("box") ? Array.from(numbers("box", [6])) : null;
  const bias = tensors.has("bias") ? numbers("bias", [1]) : null;
  const weights = numbers("weights", [bases]), mixing = numbers("mixing", [mixed, mixed]);
  return {micro: planes, weights, bias, mixing, box};
}

/** Makes codes of their differences along both axes of each plane and feature; bytes wrap around. */
function summed(codes, side) {
  for (let k = 0; k < codes.length; k++) if (k % side) codes[k] += codes[k - 1];
  for (let k = 0; k < codes.length; k++) if (k % (side * side) >= side) codes[k] += codes[k - side];
}

function finite(numbers, name) {
  if (!numbers.every(Number.isFinite)) throw new Unreadable(`the scene: ${name} holds no numbers.`);
  return numbers;
}

function fieldOf(render, model) {
  const {hidden, frequencies, view_direction: direction} = render;
  const inputs = featuresOf(render) + 6 * frequencies + 3 * Boolean(direction);
  const channels = model.get("field.out.bias")?.shape[0] ?? 0;
  if (channels < 4) throw new Unreadable("the model: its field gives no colors.");
  const part = (name, shape) => floats(tensorOf(model, `field.${name}`, shape, "the model"));
  return {
    hidden: {weight: part("hidden.weight", [hidden, inputs]), bias: part("hidden.bias", [hidden])},
    out: {weight: part("out.weight", [channels, hidden]), bias: part("out.bias", [channels])},
  };
}

/** Returns I + A, transposed: a row for each new feature. */
function withIdentity(mixing, features) {
  return Float32Array.from({length: features * features}, (_, place) => {
    const j = Math.floor(place / features), i = place % features;
    return mixing[i * features + j] + Number(i === j);
  });
}

/** Returns the hidden layer's weights on features, after the scene's mixing: a row for each hidden unit. */
function folded({hidden}, mixing, features) {
  const units = hidden.bias.length, row = hidden.weight.length / units;
  const plain = new Float32Array(units * features);
  for (let unit = 0; unit < units; unit++) {
    plain.set(hidden.weight.subarray(unit * row, unit * row + features), unit * features);
  }
  if (!mixing) return plain;
  const turned = Float32Array.from({length: features * features}, (_, place) => {
    const i = Math.floor(place / features), j = place % features;
    return mixing[i * features + j] + Number(i === j);
  });
  return multiplied(plain, turned, features);
}

/** Returns vectors times a matrix: Σ_j vector[j] matrix[i, j] for each row i. */
function multiplied(vectors, matrix, features) {
  const rows = matrix.length / features, count = vectors.length / features;
  const found = new Float32Array(count * rows);
  for (let k = 0; k < count; k++) {
    for (let i = 0; i < rows; i++) {
      let sum = 0;
      for (let j = 0; j < features; j++) sum += vectors[k * features + j] * matrix[i * features + j];
      found[k * rows + i] = sum;
    }
  }
  return found;
}

function layers(texels, side, features) {
  const wide = side + 2, found = new Float32Array(3 * Math.ceil(features / 4) * wide * wide * 4);
  for (let p = 0, k = 0; p < 3; p++) {
    for (let row = 0; row < side; row++) {
      for (let column = 0; column < side; column++) {
        for (let f = 0; f < features; f++, k++) {
          const place = ((3 * (f >> 2) + p) * wide + row + 1) * wide + column + 1;
          found[place * 4 + (f & 3)] = Math.max(-65504, Math.min(65504, texels[k])); // the range of float16
        }
      }
    }
  }
  return found;
}

function size(half) {
  return Math.cbrt(half[0] * half[1] * half[2]);
}

/** The typical camera around a scene's own box (see Viewpoint.around in core/cameras.py). */
function viewAround(view, box) {
  const angle = Math.atan(0.5 / Math.max(...view.focal));
  const least = Math.hypot(...box.half) / Math.sin(angle);
  return {...view, center: box.center, distance: Math.max(view.distance, least)};
}
