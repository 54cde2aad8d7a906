// The placement of an image on the canvas: zoom, position, mirroring and quarter turns. Lengths are in device pixels.

const TURNS = [[1, 0, 0, 1], [0, 1, -1, 0], [-1, 0, 0, -1], [0, -1, 1, 0]];

export class Place {
  constructor() { this.fit(); }

  fit() { Object.assign(this, {zoom: null, x: 0, y: 0}); }

  // Canvas size, image size in pixels of the file, height and width of a pixel, and the rotation of the image.
  measure(canvas, state, shape) {
    const finest = Math.min(...shape);
    this.columns = state.columns;
    this.rows = state.rows;
    this.pixel = {x: shape[1] / finest, y: shape[0] / finest};
    const [a, b, c, d] = TURNS[state.quarter_turns];
    const mirror = state.is_mirrored ? -1 : 1;
    this.turn = [mirror * a, mirror * b, c, d];
    const wide = this.columns * this.pixel.x, high = this.rows * this.pixel.y;
    const [width, height] = state.quarter_turns % 2 ? [high, wide] : [wide, high];
    this.fitting = Math.min(canvas.width / width, canvas.height / height);
    this.canvas = {width: canvas.width, height: canvas.height};
  }

  get scale() { return this.zoom ?? this.fitting; }

  // The matrix [a, b, c, d, e, f] from pixels of the file to pixels of the canvas.
  get matrix() {
    const [a, b, c, d] = this.turn;
    const sx = this.scale * this.pixel.x, sy = this.scale * this.pixel.y;
    const halfX = sx * this.columns / 2, halfY = sy * this.rows / 2;
    let e = this.canvas.width / 2 + this.x - (a * halfX + c * halfY);
    let f = this.canvas.height / 2 + this.y - (b * halfX + d * halfY);
    if (Number.isInteger(this.scale)) [e, f] = [Math.round(e), Math.round(f)];
    return [a * sx, b * sx, c * sy, d * sy, e, f];
  }

  toCanvas([x, y]) {
    const [a, b, c, d, e, f] = this.matrix;
    return [a * x + c * y + e, b * x + d * y + f];
  }

  toImage([x, y]) {
    const [a, b, c, d, e, f] = this.matrix;
    const det = a * d - b * c;
    return [(d * (x - e) - c * (y - f)) / det, (a * (y - f) - b * (x - e)) / det];
  }

  // Zoom by a factor. The point of the image at `at` does not move.
  zoomBy(factor, at) {
    const before = this.toImage(at);
    this.zoom = Math.min(Math.max(this.scale * factor, this.fitting / 4), 64);
    const after = this.toCanvas(before);
    this.move(at[0] - after[0], at[1] - after[1]);
  }

  move(x, y) {
    this.x += x;
    this.y += y;
  }

  // Letters at the left, top, right and bottom edge of the canvas, from those at the edges of the file.
  marks(letters) {
    if (!letters) return ['', '', '', ''];
    const [left, top, right, bottom] = letters;
    const [a, b, c, d] = this.turn;
    const toward = (x, y) => (x > 0 ? right : x < 0 ? left : y > 0 ? bottom : top);
    // A step to the right on the canvas, in file coordinates: the transpose of the rotation.
    return [toward(-a, -c), toward(-b, -d), toward(a, c), toward(b, d)];
  }
}
