// Frames of an image before windowing: fetched one at a time, kept in memory, and shown as gray levels.
// babydoctor/imaging/dicom/raw_frame.py documents the layout of a block of bytes. `shades` repeats the operations of
// imaging/windows.py and imaging/dicom/gray.py in the same order, so that both give the same gray levels.

const MAX_KEPT_BYTES = 256 * 2 ** 20;

const parse = (buffer) => {
  const length = new DataView(buffer).getUint32(0, true);
  const frame = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const {rows, columns, levels} = frame;
  let at = 4 + length;
  if (frame.kind === 'color') return {...frame, bytes: buffer.byteLength, color: new Uint8Array(buffer, at)};
  const values = new Float64Array(buffer, at, levels);
  at += 8 * levels;
  const index = frame.kind === 'gray' ? new Uint16Array(buffer, at, rows * columns) : null;
  at += index ? index.byteLength : 0;
  const shown = new Uint8Array(buffer, at, levels);
  const colors = new Uint8Array(buffer, at + levels, 3 * (frame.colored ?? 0));
  return {...frame, bytes: buffer.byteLength, values, index, shown, colors};
};

export class Frames {
  constructor(key) {
    this.key = key;
    this.kept = new Map();
    this.coming = new Map();
  }

  // The frame, if it was fetched already.
  peek(number) { return this.kept.get(number); }

  // Fetch a frame. Throws an Error with a sentence for the user.
  async get(number) {
    if (this.kept.has(number)) return this.kept.get(number);
    if (!this.coming.has(number)) {
      this.coming.set(number, this.fetch(number).finally(() => this.coming.delete(number)));
    }
    return this.coming.get(number);
  }

  async fetch(number) {
    const address = new URL(`page/frame/${this.key}/${number}`, document.baseURI);
    const response = await fetch(address).catch(() => null);
    if (!response) throw new Error('The server cannot be reached. Please try again.');
    if (!response.ok) throw new Error(await response.text());
    const frame = parse(await response.arrayBuffer());
    this.kept.set(number, frame);
    let bytes = 0;
    for (const each of this.kept.values()) bytes += each.bytes;
    for (const [old, each] of this.kept) {
      if (bytes <= MAX_KEPT_BYTES || old === number) break;
      bytes -= each.bytes;
      this.kept.delete(old);
    }
    return frame;
  }

  // Prefetch the frames that are likely to be next. An error is reported only when the frame is needed.
  ahead(number, direction, count, total) {
    for (let i = 1; i <= count; i++) {
      const next = (number + direction * i + total * i) % total;
      if (!this.kept.has(next) && this.coming.size < 3) this.get(next).catch(() => {});
    }
  }
}

// Round like numpy: half to even.
const round = (x) => {
  const near = Math.round(x);
  return near - x === 0.5 && near % 2 ? near - 1 : near;
};

// The gray level of each value of a frame. `window` is null for the file's own window.
export const shades = (frame, window, isInverted) => {
  const {values, shown, levels} = frame;
  const grays = new Uint8Array(levels);
  if (!window) {
    grays.set(shown);
  } else {
    const {center, width} = window;
    const middle = center - 0.5;
    for (let i = 0; i < levels; i++) {
      const value = values[i];
      if (Number.isNaN(value)) continue;
      let unit;
      if (width < 1) unit = (value - center) / width + 0.5;
      else if (width === 1) unit = value > middle ? 1 : 0;
      else unit = (value - middle) / (width - 1) + 0.5;
      unit = unit < 0 ? 0 : unit > 1 ? 1 : unit;
      grays[i] = round((frame.is_inverse ? 1 - unit : unit) * 255);
    }
  }
  if (isInverted) for (let i = 0; i < levels; i++) grays[i] = 255 - grays[i];
  return grays;
};

// Paint a frame onto a canvas of the frame's size, one canvas pixel for each pixel.
export const paint = (frame, window, isInverted, canvas) => {
  const {rows, columns, index, color} = frame;
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, {width: columns, height: rows});
  const context = canvas.getContext('2d');
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer); // little-endian: alpha, blue, green, red
  const flip = isInverted ? 0xffffff : 0;
  if (color) {
    for (let i = 0, at = 0; i < pixels.length; i++, at += 3) {
      pixels[i] = 0xff000000 | ((color[at + 2] << 16 | color[at + 1] << 8 | color[at]) ^ flip);
    }
  } else {
    const grays = shades(frame, window, isInverted);
    const table = new Uint32Array(grays.length);
    for (let i = 0; i < grays.length; i++) table[i] = 0xff000000 | grays[i] * 0x10101;
    for (let i = 0, at = 0; at < (frame.colors?.length ?? 0); i++, at += 3) {
      const [red, green, blue] = frame.colors.subarray(at, at + 3);
      table[frame.first_color + i] = 0xff000000 | ((blue << 16 | green << 8 | red) ^ flip);
    }
    if (index) for (let i = 0; i < pixels.length; i++) pixels[i] = table[index[i]];
    else pixels.set(table);
  }
  context.putImageData(image, 0, 0);
};
