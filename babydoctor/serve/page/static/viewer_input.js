// Mouse, wheel, keys and touch of the viewer.

import {Overlay} from './viewer_overlay.js';

const SMALLEST_REGION = 8;
const LARGEST = 1e6;

// Level and width after a drag by (x, y) CSS pixels: right is wider, down is a higher level.
const dragged = (start, x, y, step) => {
  const speed = Math.max(step, start.width / 300);
  const snap = (value) => Math.round(value / step) * step;
  const limit = (value, low) => Number(Math.min(Math.max(value, low), LARGEST).toPrecision(9));
  return {
    preset: null,
    center: limit(snap(start.center + y * speed), -LARGEST),
    width: limit(snap(start.width + x * speed), Math.min(1, step)),
  };
};

export const listen = (viewer) => {
  const {canvas, screen} = viewer;
  viewer.overlay = new Overlay(screen);
  const fingers = new Map();
  let drag = null;
  let wheel = 0;

  const point = ({clientX, clientY}) => {
    const edge = canvas.getBoundingClientRect();
    return [(clientX - edge.left) * devicePixelRatio, (clientY - edge.top) * devicePixelRatio];
  };
  const limited = ([x, y]) => [
    Math.min(Math.max(x, 0), viewer.state.columns), Math.min(Math.max(y, 0), viewer.state.rows),
  ];
  const box = ([x1, y1], [x2, y2]) => [
    Math.floor(Math.min(x1, x2)), Math.floor(Math.min(y1, y2)), Math.ceil(Math.max(x1, x2)), Math.ceil(Math.max(y1, y2)),
  ];

  const begin = (event, kind) => {
    const at = point(event);
    drag = {kind, at, x: event.clientX, y: event.clientY, image: limited(viewer.place.toImage(at))};
    if (kind === 'window') drag.window = viewer.window ?? {center: viewer.frame.center, width: viewer.frame.width};
    viewer.isHeld = true;
  };

  const move = (event) => {
    const at = point(event);
    const image = limited(viewer.place.toImage(at));
    if (drag.kind === 'window') {
      const x = event.clientX - drag.x, y = event.clientY - drag.y;
      if (!x && !y && !drag.moved) return;
      drag.moved = true;
      viewer.change(dragged(drag.window, x, y, viewer.state.step));
      return;
    }
    if (drag.kind === 'pan') viewer.place.move(at[0] - drag.at[0], at[1] - drag.at[1]);
    if (drag.kind === 'zoom') viewer.place.zoomBy(1.01 ** (event.clientY - drag.y), drag.origin ??= drag.at);
    if (drag.kind === 'ruler') viewer.ruler = [drag.image, image];
    if (drag.kind === 'region') viewer.box = box(drag.image, image);
    if (drag.kind === 'zoom' || drag.kind === 'pan') Object.assign(drag, {at, x: event.clientX, y: event.clientY});
    viewer.draw();
  };

  const end = () => {
    viewer.isHeld = false;
    if (drag?.kind === 'region' && viewer.box) {
      const [left, top, right, bottom] = viewer.box;
      const isLarge = right - left >= SMALLEST_REGION && bottom - top >= SMALLEST_REGION;
      viewer.choose('window');
      if (isLarge) viewer.change({region: [left, top, right, bottom]});
      else viewer.note('The box is too small: draw a larger one.');
    }
    drag = null;
  };

  // Two fingers: zoom by their distance, pan by their midpoint.
  const pinch = () => {
    const [one, two] = [...fingers.values()].map(point);
    const now = {middle: [(one[0] + two[0]) / 2, (one[1] + two[1]) / 2], reach: Math.hypot(one[0] - two[0], one[1] - two[1])};
    const before = drag?.kind === 'pinch' ? drag : now;
    if (before.reach > 0) viewer.place.zoomBy(now.reach / before.reach, before.middle);
    viewer.place.move(now.middle[0] - before.middle[0], now.middle[1] - before.middle[1]);
    drag = {kind: 'pinch', ...now};
    viewer.draw();
  };

  canvas.addEventListener('pointerdown', (event) => {
    if (!viewer.frame) return;
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({preventScroll: true});
    viewer.note('');
    if (event.pointerType === 'touch') fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      drag = null;
      viewer.box = null;
      return pinch();
    }
    if (event.button === 1) begin(event, 'pan');
    else if (event.button === 2) begin(event, 'zoom');
    else if (viewer.tool !== 'window') begin(event, viewer.tool);
    else if (viewer.state.has_window && viewer.frame.values) begin(event, 'window');
    if (event.button === 1) event.preventDefault(); // prevent autoscroll
  });
  canvas.addEventListener('pointermove', (event) => {
    if (!viewer.frame) return;
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
    viewer.pointer = point(event);
    if (fingers.size === 2) pinch();
    else if (drag && drag.kind !== 'pinch') move(event);
    else viewer.overlay.point(viewer);
  });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, (event) => {
    fingers.delete(event.pointerId);
    end();
  });
  canvas.addEventListener('pointerleave', () => {
    viewer.pointer = null;
    if (viewer.frame) viewer.overlay.point(viewer);
  });
  canvas.addEventListener('contextmenu', (event) => event.preventDefault());
  canvas.addEventListener('dblclick', () => viewer.state && viewer.reset());
  canvas.addEventListener('wheel', (event) => {
    if (!viewer.frame) return;
    if (event.ctrlKey) {
      event.preventDefault();
      viewer.place.zoomBy(1.002 ** -event.deltaY, point(event));
      return viewer.draw();
    }
    if (viewer.state.frames < 2) return; // the tab scrolls
    event.preventDefault();
    wheel += event.deltaMode ? 40 * event.deltaY : event.deltaY;
    const count = Math.trunc(wheel / 40);
    wheel -= 40 * count;
    if (count) viewer.step(Math.abs(count) <= 3 ? Math.sign(count) : count);
  }, {passive: false});

  const middle = () => [canvas.width / 2, canvas.height / 2];
  const zoom = (factor) => {
    viewer.place.zoomBy(factor, middle());
    viewer.draw();
  };
  const turn = (count) => viewer.change({quarter_turns: (viewer.state.quarter_turns + count + 4) % 4});
  const mirror = () => {
    // Mirroring is applied before rotation, so it reverses the rotation of an image that is turned by 90 degrees.
    const {quarter_turns: turns, is_mirrored: was} = viewer.state;
    viewer.change({is_mirrored: !was, quarter_turns: (4 - turns) % 4});
  };
  const actions = {
    region: () => viewer.choose('region'),
    whole: () => viewer.change({region: null}),
    ruler: () => {
      viewer.ruler = null;
      viewer.choose('ruler');
    },
    invert: () => viewer.change({is_inverted: !viewer.state.is_inverted}),
    turn: () => turn(1),
    mirror,
    upside: () => {
      mirror();
      turn(2);
    },
    fit: () => {
      viewer.place.fit();
      viewer.draw();
    },
    actual: () => {
      Object.assign(viewer.place, {zoom: 1, x: 0, y: 0});
      viewer.draw();
    },
    cine: () => viewer.play(),
    reset: () => viewer.reset(),
    cancel: () => {
      viewer.ruler = null;
      viewer.tool = 'none';
      viewer.choose('window');
    },
    larger: () => zoom(1.25),
    smaller: () => zoom(0.8),
  };
  const run = (name) => (viewer.actions?.[name] ?? actions[name])?.();
  const keys = {
    b: 'region', m: 'ruler', i: 'invert', t: 'turn', h: 'mirror', v: 'upside', f: 'fit', z: 'actual', ' ': 'cine',
    r: 'reset', l: 'link', Escape: 'cancel', '+': 'larger', '=': 'larger', '-': 'smaller',
  };
  const steps = {ArrowUp: -1, ArrowLeft: -1, PageUp: -10, ArrowDown: 1, ArrowRight: 1, PageDown: 10, Home: -1e9, End: 1e9};

  canvas.addEventListener('keydown', (event) => {
    if (!viewer.frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (steps[key] && viewer.state.frames > 1) viewer.step(steps[key]);
    else if (/^\d$/.test(key) && viewer.state.has_window && Number(key) <= viewer.state.presets.length) {
      const preset = key === '0' ? null : viewer.state.presets[Number(key) - 1][0];
      viewer.change({preset, center: null, width: null});
    } else if (keys[key]) run(keys[key]);
    else return;
    event.preventDefault();
  });
  screen.addEventListener('click', (event) => {
    const name = event.target.closest('button[data-do]')?.dataset.do;
    if (name && (viewer.frame || name === 'close')) run(name);
  });
};
