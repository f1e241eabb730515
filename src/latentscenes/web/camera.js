// Cameras on spheres around scenes, as core/cameras.py has them: OpenCV axes, world z up.

/** Where thumbnails are seen from, degrees; also where elements start. */
export const START = {azimuth: 40, elevation: 25, zoom: 1};
const STEEPEST = 89, ZOOMS = [0.5, 8], FILLED = 0.95;
/** How far the box reaches from the middle of thumbnails (see model/pictures.py). */
const THUMBNAIL_REACH = 0.48;

/** Returns a view whose numbers are finite and in range; angles in degrees. */
export function tamed({azimuth, elevation, zoom}) {
  const or = (value, other) => Number.isFinite(value) ? value : other;
  const [least, most] = ZOOMS;
  return {
    azimuth: ((or(azimuth, START.azimuth) % 360) + 360) % 360,
    elevation: Math.min(STEEPEST, Math.max(-STEEPEST, or(elevation, START.elevation))),
    zoom: Math.min(most, Math.max(least, or(zoom, 1))),
  };
}

/**
 * Returns the camera of a view for pictures of any shape. At zoom 1, the picture holds the box from all sides
 * at this elevation, as large as it fits.
 *
 * typical: the typical camera of the library (`library.view` in published.json).
 */
export function cameraOf(typical, box, view, width, height) {
  const camera = cameraAt(typical, view, width, height);
  const fit = view.zoom * fitOf(typical, box, view, width, height);
  camera.lens[0] *= fit;
  camera.lens[1] *= fit;
  return camera;
}

/** How much larger pictures are at zoom 1 than those that have the typical camera's picture in the middle. */
function fitOf(typical, box, view, width, height) {
  let most = 1e-6;
  for (let azimuth = 0; azimuth < 180; azimuth += 15) {
    most = Math.max(most, reach(cameraAt(typical, {...view, azimuth}, width, height), box));
  }
  return most === Infinity ? 1 : FILLED / (2 * most);
}

/** How much larger than a picture a thumbnail has to be, to lie where the object will. */
export function thumbnailFit(typical, box, width, height) {
  const [tall, wide] = typical.size, own = THUMBNAIL_REACH / reach(cameraAt(typical, START, wide, tall), box);
  return fitOf(typical, box, START, width, height) / own;
}

/** The farthest that the box reaches from the middle of the picture, as a fraction of width or height. */
function reach({axes, eye, lens}, box) {
  let most = 0;
  for (let corner = 0; corner < 8; corner++) {
    const offset = eye.map((value, k) => box.center[k] + (corner >> k & 1 ? 1 : -1) * box.half[k] - value);
    const [x, y, z] = [0, 3, 6].map(k => offset.reduce((sum, value, j) => sum + value * axes[k + j], 0));
    if (z <= 0) return Infinity; // the camera is inside
    most = Math.max(most, Math.abs(lens[0] * x / z), Math.abs(lens[1] * y / z));
  }
  return most;
}

function cameraAt({size: [tall, wide], distance, focal, center}, {azimuth, elevation}, width, height) {
  const [a, e] = [azimuth, elevation].map(degrees => degrees * Math.PI / 180);
  const outward = [Math.cos(e) * Math.cos(a), Math.cos(e) * Math.sin(a), Math.sin(e)];
  const right = [-Math.sin(a), Math.cos(a), 0]; // forward × up, of length 1
  const down = [Math.sin(e) * Math.cos(a), Math.sin(e) * Math.sin(a), -Math.cos(e)]; // forward × right
  const scale = Math.min(width / wide, height / tall);
  return {
    axes: [...right, ...down, ...outward.map(value => -value)],
    eye: outward.map((value, k) => center[k] + distance * value),
    lens: [focal[0] * wide * scale / width, focal[1] * tall * scale / height, 0.5, 0.5],
  };
}
