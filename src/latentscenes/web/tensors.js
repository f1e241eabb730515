// Files of tensors (safetensors), with every number checked before it is used.

import {Unreadable} from "./source.js";

const WIDTH = {F32: 4, F16: 2, U8: 1, I8: 1, I64: 8};
const LONGEST_HEADER = 1 << 20;

/** Returns {name: {kind, shape, bytes}}. Throws Unreadable if the file is damaged. */
export function parseTensors(file, what) {
  const refuse = problem => { throw new Unreadable(`${what}: damaged (${problem}).`); };
  if (file.length < 8) refuse("too short");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = view.getUint32(0, true);
  const most = Math.min(LONGEST_HEADER, file.length - 8);
  if (view.getUint32(4, true) || length > most) refuse("its header is too long");
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", {fatal: true}).decode(file.subarray(8, 8 + length)));
  } catch {
    refuse("its header is no JSON");
  }
  if (header?.constructor !== Object) refuse("its header is no object");
  const content = file.subarray(8 + length), found = new Map();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const {dtype, shape, data_offsets: ends} = entry ?? {};
    if (!Object.hasOwn(WIDTH, dtype)) refuse("a tensor of unknown type");
    if (!Array.isArray(shape) || shape.length > 8 || !shape.every(isCount)) refuse("a tensor of no shape");
    if (!Array.isArray(ends) || ends.length !== 2 || !ends.every(isCount)) refuse("a tensor at no place");
    const size = shape.reduce((product, side) => product * side, WIDTH[dtype]);
    if (ends[1] - ends[0] !== size || ends[1] > content.length) refuse("a tensor beyond its end");
    found.set(name, {kind: dtype, shape, bytes: content.subarray(ends[0], ends[1])});
  }
  return found;
}

/** Whether a value is a whole number from 0 on, small enough to compute with. */
export function isCount(value) {
  return Number.isSafeInteger(value) && value >= 0;
}

/** Returns the tensor of that name and shape; null if it is absent and `shape` holds a 0. */
export function tensorOf(tensors, name, shape, what) {
  const found = tensors.get(name);
  if (!found && shape.includes(0)) return null;
  if (!found || found.shape.length !== shape.length || shape.some((side, k) => side !== found.shape[k])) {
    const held = found ? `(${found.shape})` : "absent";
    throw new Unreadable(`${what}: ${name} is ${held}, but (${shape}) is needed.`);
  }
  return found;
}

/** Returns the numbers of a float32 or float16 tensor. */
export function floats({kind, bytes}) {
  const {buffer} = bytes.slice();
  if (kind === "F32") return new Float32Array(buffer);
  if (kind !== "F16") throw new Unreadable(`a tensor of type ${kind} where floats are needed.`);
  return Float32Array.from(new Uint16Array(buffer), code => HALF[code]);
}

/** The value of each float16 code (IEEE 754 binary16). */
const HALF = Float32Array.from({length: 65536}, (_, code) => {
  const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, fraction = code & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
});
