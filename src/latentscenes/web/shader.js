// The renderer as a fragment shader: the field, samples along rays, and compositing, as in rendering/field.py
// and rendering/march.py. The samples are the same as Python's: `COARSE` stratified ones, then `FINE` where
// these found density, between the first and the last occupied cell of a ray (rendering/occupancy.py). Cells
// that the occupancy grid marks as empty are not evaluated, and rays end where hardly any light is left.

import {featuresOf} from "./compose.js";

/** Cells along each side of the occupancy grid, as in rendering/occupancy.py. */
export const CELLS = 48;
/** Most places along each side of a cell at which densities are looked up, as there. */
const LOOKUPS = 4;
/** Places along a ray at which the first and the last occupied cell are looked for, as there. */
const STEPS = 72;
/** Tiles of the grid's picture in a row; each tile is a layer in z. */
export const TILES = 8;
/**
 * What the grid says of a cell, as bytes. `WHITE` cells hold only white matter that is connected with the
 * space around the object; in `EDGE` cells it lies beside other matter.
 */
export const EMPTY = 0, WHITE = 85, EDGE = 170, MATTER = 255;

/** Pixels that differ more from a neighbor, in a channel from 0 to 1, are edges. */
const CONTRAST = 0.15;

export const VERTEX = `#version 300 es
void main() {
  gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0, 0.0, 1.0);
}`;

/**
 * Sizes that the shaders of a library are compiled for. Where planes are summed, reading is linear, so the
 * planes hold what the hidden layer makes of their features (`folded`). Then only inputs besides them are
 * multiplied in the shader.
 */
export function sizes(render) {
  const features = featuresOf(render), folded = render.aggregation === "sum";
  const more = 6 * render.frequencies + 3 * Boolean(render.view_direction);
  const inputs = folded ? more : features + more;
  const stored = folded ? render.hidden : features;
  return {features, folded, stored, groups: Math.ceil(stored / 4), inputs, inputGroups: Math.ceil(inputs / 4),
          quads: Math.ceil(render.hidden / 4)};
}

/** Returns the numbers of a network as the shaders' uniform block holds them. */
export function packNetwork(render, {hidden, out}) {
  const {features, folded, inputs, inputGroups, quads} = sizes(render), units = render.hidden;
  const row = hidden.weight.length / units, first = folded ? features : 0;
  const block = new Float32Array(16 * quads * inputGroups + 16 * quads + 4 * quads + 4);
  for (let unit = 0; unit < units; unit++) {
    const quad = unit >> 2, lane = unit & 3;
    for (let k = 0; k < inputs; k++) {
      const place = 16 * (quad * inputGroups + (k >> 2)) + 4 * (k & 3) + lane;
      block[place] = hidden.weight[unit * row + first + k];
    }
    const outside = 16 * quads * inputGroups + 16 * quad + 4 * lane;
    for (let c = 0; c < 4; c++) block[outside + c] = out.weight[c * units + unit];
    block[16 * quads * (inputGroups + 1) + unit] = hidden.bias[unit];
  }
  for (let c = 0; c < 4; c++) block[block.length - 4 + c] = out.bias[c];
  return block;
}

/** The sum or product of the three planes, four features of it. */
function planesAt(render, group) {
  const sign = render.aggregation === "sum" ? " + " : " * ";
  return ["first", "second", "last"]
    .map((place, k) => `textureLod(planes, vec3(${place}, ${3 * group + k}.0), 0.0)`).join(sign);
}

/** Declares the inputs that the shader multiplies, four each: i0, i1, … */
function declareInputs(render) {
  const {features, folded, groups, inputGroups} = sizes(render), first = folded ? 0 : features;
  const more = [];
  for (const wave of ["sin", "cos"]) {
    for (const axis of "xyz") {
      for (let k = 0; k < render.frequencies; k++) {
        more.push(`${wave}(p.${axis} * ${(Math.PI * 2 ** k).toFixed(7)})`);
      }
    }
  }
  if (render.view_direction) more.push("toward.x", "toward.y", "toward.z");
  const lines = Array.from({length: inputGroups}, (_, g) =>
    `vec4 i${g} = ${folded || g >= groups ? "vec4(0.0)" : planesAt(render, g)};`);
  more.forEach((text, k) => lines.push(`i${(first + k) >> 2}[${(first + k) & 3}] = ${text};`));
  return lines;
}

/** The field: density and color (−1 to 1) at a point of [−1, 1]³. */
function field(render) {
  const {folded, inputGroups, quads} = sizes(render), lines = declareInputs(render);
  const units = Array.from({length: quads}, (_, q) => {
    const terms = Array.from({length: inputGroups}, (_, g) => `hidden[${q * inputGroups + g}] * i${g}`);
    const all = [`hiddenBias[${q}]`, ...(folded ? [planesAt(render, q)] : []), ...terms];
    return `raw += outer[${q}] * softplus(${all.join(" + ")});`;
  });
  const half = (render.resolution / 2).toFixed(1), wide = (render.resolution + 2).toFixed(1);
  return `#version 300 es
precision highp float;
precision highp sampler2DArray;
precision highp sampler2D;
uniform sampler2DArray planes;
layout(std140) uniform Network {
  ${inputGroups ? `mat4 hidden[${quads * inputGroups}];` : ""}
  mat4 outer[${quads}];
  vec4 hiddenBias[${quads}];
  vec4 outBias;
};

vec4 softplus(vec4 x) { return max(x, 0.0) + log(1.0 + exp(-abs(x))); }

vec2 texel(vec2 p) { return ((p + 1.0) * ${half} + 1.0) / ${wide}; }

vec4 field(vec3 p, vec3 toward) {
  vec2 first = texel(p.xy), second = texel(p.xz), last = texel(${render.axes === "eg3d" ? "p.zx" : "p.yz"});
  ${lines.join("\n  ")}
  vec4 raw = outBias;
  ${units.join("\n  ")}
  vec3 color = 2.0 * (1.002 / (1.0 + exp(-raw.yzw)) - 0.001) - 1.0;
  return vec4(softplus(vec4(raw.x - 1.0)).x, color);
}
`;
}

/**
 * Writes of all cells of the grid whether their density exceeds `least`, and their color, from the places that
 * rendering/occupancy.py looks up, too: the mean of the density, and the color of the densest.
 */
export function probeShader(render) {
  const count = Math.min(Math.ceil(render.resolution / CELLS), LOOKUPS);
  return `${field(render)}
uniform float least;
out vec4 written;
void main() {
  ivec2 place = ivec2(gl_FragCoord.xy);
  ivec2 tile = place / ${CELLS};
  vec3 cell = vec3(place - tile * ${CELLS}, tile.y * ${TILES} + tile.x);
  vec4 densest = vec4(0.0);
  float sum = 0.0;
  for (int x = 0; x < ${count}; x++) {
    for (int y = 0; y < ${count}; y++) {
      vec3 inside = (vec3(x, y, (${2 * count} - x - y) % ${count}) + 0.5) / ${count.toFixed(1)};
      vec4 here = field((cell + inside) / ${(CELLS / 2).toFixed(1)} - 1.0, vec3(0.0, 0.0, 1.0));
      if (here.x >= densest.x) densest = here;
      sum += here.x;
    }
  }
  float density = sum / ${(count * count).toFixed(1)};
  written = vec4(density > least ? 1.0 : 0.0, 0.5 + 0.5 * densest.yzw);
}`;
}

/** Renders a picture. */
export function viewShader(render) {
  const {coarse, fine} = render, bounded = render.near !== null && render.near !== undefined;
  const narrowed = !bounded && !render.frequencies && !render.view_direction;
  return `${field(render)}
uniform sampler2D grid;       // what is in each cell
uniform sampler2D sharp;      // the picture with one ray for each pixel
uniform int smoothing;        // number of the ray for edges; 0: one ray for each pixel
uniform vec2 corner;          // of the picture in the drawing buffer, pixels
uniform vec2 pixels;          // width and height of the picture
uniform vec4 lens;            // fx, fy, cx, cy as fractions of width and height
uniform mat3 axes;            // columns: right, down, forward
uniform vec3 eye, center, halfSides;
uniform float unit;
uniform vec2 bounds;          // of distances, in scene units
uniform bool clean;           // whether to leave out white matter around the object
uniform vec2 haze;            // opacities from which on matter is shown, and from which on it is solid
out vec4 written;

const int N = ${coarse}, M = ${fine};

/** What the grid says of a point: EMPTY 0 to MATTER 3. */
int cellAt(vec3 p) {
  if (any(greaterThan(abs(p), vec3(1.0001)))) return 3;
  ivec3 cell = min(ivec3((p + 1.0) * ${(CELLS / 2).toFixed(1)}), ${CELLS - 1});
  ivec2 tile = ivec2(cell.z % ${TILES}, cell.z / ${TILES});
  return int(texelFetch(grid, tile * ${CELLS} + cell.xy, 0).r * 3.0 + 0.5);
}

bool occupied(vec3 p) { return cellAt(p) > (clean ? 1 : 0); }

/** The field, without white matter around the object. */
vec4 matter(vec3 p, vec3 toward) {
  vec4 found = field(p, toward);
  int cell = cellAt(p);
  if (clean && cell < 2) found.x = 0.0;
  if (clean && cell == 2) found.x *= 1.0 - smoothstep(0.85, 0.96, min(found.y, min(found.z, found.w)));
  return found;
}

float weights[N];

float blurred(int k) {
  float before = weights[max(k - 1, 0)], own = weights[k], after = weights[min(k + 1, N - 2)];
  return 0.5 * (max(before, own) + max(own, after)) + 0.01;
}

/** Color (premultiplied, −1 to 1) and opacity of a ray. */
vec4 march(vec3 origin, vec3 direction, float near, float far) {
  vec3 toward = normalize(direction);
  float stride = (far - near) / float(N), start = near + 0.5 * stride;
  vec4 known[N];
  float through = 1.0;
  for (int k = 0; k < N; k++) {
    known[k] = vec4(-1.0);
    vec3 p = origin + (start + stride * float(k)) * direction;
    if (through > 0.0005 && occupied(p)) known[k] = matter(p, toward);
    if (k > 0) {
      float kept = exp(-0.5 * stride * (max(known[k - 1].x, 0.0) + max(known[k].x, 0.0)));
      weights[k - 1] = through * (1.0 - kept);
      through *= kept;
    }
  }
  float total = 0.0;
  for (int k = 0; k < N - 1; k++) total += blurred(k);

  vec4 sum = vec4(0.0), last = vec4(-1.0);
  vec3 lastPlace = vec3(0.0);
  float low = 0.0, high = 0.0, lastT = near;
  bool lastFull = false;
  int passed = 0, refined = 0; // coarse and fine samples before this one
  through = 1.0;
  for (int n = 0; n < N + M; n++) {
    float t, wanted = (float(refined) + 0.5) / float(max(M, 1)) * total;
    vec4 own = vec4(-1.0);
    if (passed > 0 && refined < M && (wanted < high || passed == N - 1)) {
      float fraction = clamp((wanted - low) / (high - low), 0.0, 1.0);
      t = start + stride * (float(passed - 1) + fraction);
      refined++;
    } else {
      t = start + stride * float(passed);
      own = known[min(passed, N - 1)];
      low = high;
      if (passed < N - 1) high += blurred(passed);
      passed++;
    }
    vec3 p = origin + t * direction;
    bool full = own.x >= 0.0 || occupied(p);
    if (full || lastFull) {
      if (own.x < 0.0) own = matter(p, toward);
      if (last.x < 0.0 && n > 0) last = matter(lastPlace, toward);
      if (n > 0) {
        float kept = exp(-0.5 * (last.x + own.x) * (t - lastT));
        float weight = through * (1.0 - kept);
        sum += weight * vec4(0.5 * (last.yzw + own.yzw), 1.0);
        through *= kept;
        if (through < 0.0005) break;
      }
    }
    last = own;
    lastFull = full;
    lastT = t;
    lastPlace = p;
  }
  return sum;
}

/** Moves the ends of a ray to its first and last occupied cell. If it meets none, both are the same. */
void narrow(vec3 origin, vec3 direction, inout float near, inout float far) {
  float stride = (far - near) / ${STEPS}.0, start = near + 0.5 * stride;
  int first = 0, last = ${STEPS - 1};
  while (first < ${STEPS} && !occupied(origin + (start + stride * float(first)) * direction)) first++;
  while (last > first && !occupied(origin + (start + stride * float(last)) * direction)) last--;
  far = near + stride * float(last + 1);
  near = first < ${STEPS} ? near + stride * float(first) : far;
}

/** How much a pixel and its eight neighbors differ, in the channel where they differ most. */
float contrast(ivec2 pixel) {
  vec4 low = vec4(1.0), high = vec4(0.0);
  for (int k = 0; k < 9; k++) {
    ivec2 near = clamp(pixel + ivec2(k % 3, k / 3) - 1, ivec2(0), ivec2(pixels) - 1);
    vec4 found = texelFetch(sharp, near, 0);
    low = min(low, found);
    high = max(high, found);
  }
  vec4 range = high - low;
  return max(max(range.x, range.y), max(range.z, range.w));
}

void main() {
  ivec2 pixel = ivec2(gl_FragCoord.xy);
  if (smoothing > 0 && contrast(pixel) < ${CONTRAST}) {
    if (smoothing > 1) discard;
    written = texelFetch(sharp, pixel, 0);
    return;
  }
  vec2 place = gl_FragCoord.xy - corner;
  vec2 share = vec2(place.x, pixels.y - place.y) / pixels;
  vec3 world = normalize(axes * vec3((share - lens.zw) / lens.xy, 1.0));
  vec3 origin = (eye - center) / halfSides, direction = world / halfSides * unit;
  vec3 safe = mix(direction, vec3(1e-12), vec3(lessThan(abs(direction), vec3(1e-30))));
  vec3 a = (-1.0 - origin) / safe, b = (1.0 - origin) / safe, early = min(a, b), late = max(a, b);
  float near = max(max(early.x, max(early.y, early.z)), 0.0), far = min(late.x, min(late.y, late.z));
  ${bounded ? "near = bounds.x; far = bounds.y;" : ""}
  written = vec4(0.0);
  if (far <= near) return;
  ${narrowed ? "narrow(origin, direction, near, far);\n  if (far <= near) return;" : ""}
  vec4 found = march(origin, direction, near, far);
  float alpha = clamp((found.w - haze.x) / (haze.y - haze.x), 0.0, 1.0);
  vec3 color = clamp((0.5 * (found.xyz + found.w)) / max(found.w, 1e-4), 0.0, 1.0);
  written = vec4(color * alpha, alpha);
}`;
}
