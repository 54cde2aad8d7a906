// The overlay of the canvas: orientation letters, values under the pointer, the ruler, the region; and the buttons.

const text = (element, value) => { if (element.textContent !== value) element.textContent = value; };
const short = (value) => String(Number(value.toPrecision(6)));

export class Overlay {
  constructor(screen) {
    this.screen = screen;
    this.svg = screen.querySelector('svg');
    this.marks = ['left', 'top', 'right', 'bottom'].map((edge) => screen.querySelector(`.bd-mark.${edge}`));
    this.where = screen.querySelector('.where');
    this.value = screen.querySelector('.value');
    this.shade = screen.querySelector('.bd-shade');
    this.ruler = screen.querySelector('.bd-ruler');
  }

  draw(viewer) {
    const {canvas, place, frame, state} = viewer;
    this.svg.setAttribute('viewBox', `0 0 ${canvas.width} ${canvas.height}`);
    place.marks(frame.marks).forEach((letters, i) => text(this.marks[i], letters));
    const window = viewer.window ?? (frame.values ? frame : null);
    const parts = state.frames > 1 ? [`${state.noun} ${viewer.drawn + 1} of ${state.frames}`] : [];
    if (window) parts.push(`level ${short(window.center)}, width ${short(window.width)}`);
    parts.push(`${Math.round(100 * place.scale)}%`);
    if (frame.step > 1) parts.push(`every ${frame.step}th pixel is shown`);
    text(this.where, parts.join(' · '));
    this.point(viewer);
    this.drawRegion(viewer);
    this.drawRuler(viewer);
    this.buttons(viewer);
  }

  clear() {
    for (const element of [...this.marks, this.where, this.value]) text(element, '');
    this.shade.replaceChildren();
    this.ruler.replaceChildren();
  }

  // Position and value under the pointer.
  point({pointer, place, frame, state, canvas}) {
    if (!pointer) return text(this.value, '');
    const [x, y] = place.toImage(pointer).map(Math.floor);
    if (x < 0 || y < 0 || x >= state.columns || y >= state.rows) return text(this.value, '');
    const at = Math.floor(y / frame.step) * frame.columns + Math.floor(x / frame.step);
    let value;
    if (frame.color) {
      value = frame.color.length > 3 * at + 2 ? `RGB ${frame.color.slice(3 * at, 3 * at + 3).join(' ')}` : '';
    } else {
      const found = frame.values[frame.index ? frame.index[at] : at];
      value = Number.isNaN(found) ? 'no value' : `${short(found)} ${frame.unit ?? ''}`.trim();
    }
    text(this.value, `column ${x + 1}, row ${y + 1}: ${value}`);
  }

  drawRegion({box, place, canvas, state}) {
    const region = box ?? state.region;
    if (!region) return this.shade.replaceChildren();
    const [left, top, right, bottom] = region;
    const corners = [[left, top], [right, top], [right, bottom], [left, bottom]].map((point) => place.toCanvas(point));
    const inside = `M${corners.map((corner) => corner.join()).join('L')}Z`;
    const outside = `M0,0H${canvas.width}V${canvas.height}H0Z`;
    this.shade.innerHTML = `<path class="bd-outside" fill-rule="evenodd" d="${outside}${inside}"/>`
      + `<path class="bd-edge" d="${inside}"/>`;
  }

  drawRuler({ruler, place, frame}) {
    if (!ruler) return this.ruler.replaceChildren();
    const [[x1, y1], [x2, y2]] = ruler.map((point) => place.toCanvas(point));
    const size = 14 * devicePixelRatio;
    const label = length(ruler, frame);
    this.ruler.innerHTML = `<path class="bd-edge" d="M${x1},${y1}L${x2},${y2}"/>`
      + `<circle cx="${x1}" cy="${y1}" r="${size / 4}"/><circle cx="${x2}" cy="${y2}" r="${size / 4}"/>`
      + `<text x="${x2 + size / 2}" y="${y2 - size / 2}" font-size="${size}">${label}</text>`;
  }

  buttons({tool, state, playing, frame}) {
    const pressed = {
      region: tool === 'region', ruler: tool === 'ruler', invert: state.is_inverted, mirror: state.is_mirrored,
      cine: Boolean(playing),
    };
    for (const [name, value] of Object.entries(pressed)) this.button(name)?.setAttribute('aria-pressed', String(value));
    const [whole, cine] = [this.button('whole'), this.button('cine')];
    if (whole) whole.hidden = state.region === null;
    if (cine) { // the second viewer has neither control
      cine.hidden = state.frames < 2;
      text(cine, playing ? 'Stop playing' : 'Play');
    }
    // An image without a window that fits the canvas has nothing to drag, so a finger scrolls the page.
    this.screen.dataset.drags = String(Boolean(frame.values) || tool !== 'window');
  }

  button(name) { return this.screen.querySelector(`[data-do=${name}]`); }
}

// A distance in mm if the file has a pixel spacing, else in pixels.
export const length = ([[x1, y1], [x2, y2]], {spacing, at_detector: atDetector}) => {
  if (!spacing) return `${Math.hypot(x2 - x1, y2 - y1).toFixed(1)} pixels`;
  const mm = Math.hypot((x2 - x1) * spacing[1], (y2 - y1) * spacing[0]);
  return `${mm.toFixed(1)} mm${atDetector ? ' at the detector' : ''}`;
};
