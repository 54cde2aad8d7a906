// The image viewer: a canvas that windows, scrolls, zooms and rotates in the browser, without requests to the server.
// When the user pauses, `send` reports what is shown, and the server renders the same image for the model.

import {Frames, paint} from './viewer_frames.js';
import {listen} from './viewer_input.js';
import {Place} from './viewer_place.js';

const REST_MS = 200;
const SETTLE_MS = 8000;
const SHOWN = ['frame', 'preset', 'center', 'width', 'is_inverted', 'is_mirrored', 'quarter_turns', 'region'];
const CINE_MS = 100;

// The viewers of this tab.
export const current = {viewer: null, second: null};

export const viewer = (element, trigger) => {
  current.viewer?.close();
  current.viewer = new Viewer(element.querySelector('.bd-screen'), trigger);
};

// Called before a question is sent: waits until the server has rendered what the canvas shows.
export const settled = async (inputs) => {
  await current.viewer?.settle();
  return inputs;
};

// `source` is the id of the element with the state that the server sends.
export class Viewer {
  constructor(screen, trigger, source = 'bd-viewer') {
    this.screen = screen;
    this.source = source;
    this.trigger = trigger;
    this.canvas = screen.querySelector('canvas');
    this.picture = document.createElement('canvas');
    this.place = new Place();
    this.state = null;
    this.tool = 'window';
    this.ruler = null;
    this.box = null;
    this.direction = 1;
    this.pointer = null;
    listen(this);
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.canvas);
    this.changes = new MutationObserver(() => this.read());
    this.changes.observe(document.body, {childList: true, subtree: true});
    this.read();
  }

  close() {
    this.sizes.disconnect();
    this.changes.disconnect();
    clearTimeout(this.timer);
    this.stop();
  }

  // Apply the server's state, unless the canvas has changed since.
  read() {
    const box = document.getElementById(this.source);
    const text = box?.querySelector('[data-viewer]')?.dataset.viewer ?? '';
    if (text === this.text) return;
    this.text = text;
    if (!text) {
      this.state = null;
      this.screen.hidden = true;
      return;
    }
    const state = JSON.parse(text);
    const isNew = state.key !== this.state?.key;
    if (!isNew && state.change < this.state.change) return;
    if (isNew) this.open(state);
    this.state = state;
    this.isSettled(true);
    this.screen.hidden = false;
    this.resize();
    this.show(state.frame);
  }

  open(state) {
    clearTimeout(this.timer);
    this.stop();
    this.frames = new Frames(state.key);
    this.frame = null;
    this.followed = null;
    this.ruler = null;
    this.choose('window');
    this.place.fit();
    // Clear everything of the previous image.
    this.canvas.getContext('2d').reset();
    this.overlay.clear();
    this.note('Loading the image…');
  }

  // Change what is shown. The server gets the change after a short pause.
  change(values) {
    Object.assign(this.state, values);
    this.state.change += 1;
    this.isSettled(false);
    clearTimeout(this.timer);
    if (!this.playing) this.timer = setTimeout(() => this.send(), REST_MS);
    if (values.frame === undefined) this.draw();
    else this.show(values.frame);
  }

  send() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.isHeld) {  // a drag: send at its end
      this.timer = setTimeout(() => this.send(), REST_MS);
      return;
    }
    this.trigger('change', this.shown());
  }

  // The state that the server needs to render the same image.
  shown() {
    const shown = Object.fromEntries(SHOWN.map((name) => [name, this.state[name]]));
    return {key: this.state.key, change: this.state.change, ...shown};
  }

  isSettled(value) {
    this.screen.dataset.sync = value ? 'done' : 'waiting';
    document.getElementById(this.source)?.classList.toggle('bd-waiting', !value);
    if (value) this.whenSettled?.();
  }

  async settle() {
    if (!this.state || this.screen.dataset.sync === 'done') return;
    this.stop();
    this.isHeld = false;
    this.send();
    await new Promise((resolve) => {
      this.whenSettled = resolve;
      setTimeout(resolve, SETTLE_MS);
    });
    this.whenSettled = null;
  }

  // The window applied in the browser; null for the frame's own.
  get window() {
    const {center, width, preset, presets} = this.state;
    if (preset !== null) {
      const [, level, range] = presets.find(([name]) => name === preset);
      return {center: level, width: range};
    }
    return center === null ? null : {center, width};
  }

  // Show a frame. The previous one stays visible until it has loaded.
  async show(number) {
    const {frames, state} = this;
    if (this.followed !== number) { // let the linked viewer follow
      this.followed = number;
      document.dispatchEvent(new CustomEvent('bd-shown', {detail: this}));
    }
    try {
      const frame = frames.peek(number) ?? await frames.get(number);
      if (frames !== this.frames || number !== this.state.frame) return;
      Object.assign(this, {frame, drawn: number});
      this.note('');
      frames.ahead(number, this.direction, this.playing ? 8 : 3, state.frames);
      this.resize();
    } catch (error) {
      if (frames === this.frames) this.note(error.message);
    }
  }

  step(count) {
    const {frame, frames} = this.state;
    const next = Math.min(Math.max(frame + count, 0), frames - 1);
    this.direction = Math.sign(count) || 1;
    if (next !== frame) this.change({frame: next});
  }

  play() {
    if (this.playing) return this.stop(true);
    if (this.state.frames < 2) return;
    const pause = this.state.frame_ms ?? CINE_MS;
    this.direction = 1;
    let due = performance.now() + pause;
    const tick = (now) => {
      const next = (this.state.frame + 1) % this.state.frames;
      if (now >= due && this.drawn === this.state.frame) {
        due = Math.max(due + pause, now);
        this.change({frame: next});
      }
      this.playing = requestAnimationFrame(tick);
    };
    this.playing = requestAnimationFrame(tick);
    this.draw();
  }

  stop(tells = false) {
    if (!this.playing) return;
    cancelAnimationFrame(this.playing);
    this.playing = null;
    if (tells) this.change({});
  }

  reset() {
    this.stop();
    this.place.fit();
    this.ruler = null;
    this.choose('window');
    this.change({
      preset: this.state.default_preset, center: null, width: null,
      is_inverted: false, is_mirrored: false, quarter_turns: 0, region: null,
    });
  }

  choose(tool) {
    this.tool = this.tool === tool ? 'window' : tool;
    this.box = null;
    this.screen.dataset.tool = this.tool;
    if (this.state) this.draw();
  }

  note(text) {
    const note = this.screen.querySelector('.bd-pane-note');
    if (note.textContent !== text) note.textContent = text;
  }

  resize() {
    const ratio = devicePixelRatio;
    const width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
    if (!width || !this.state) return;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, {width, height});
    this.draw();
  }

  // Text that is hidden from the model is hidden here, too.
  hideText(context) {
    context.fillStyle = '#555';
    for (const [left, top, right, bottom] of this.state.hidden) context.fillRect(left, top, right - left, bottom - top);
  }

  draw() {
    this.request ??= requestAnimationFrame(() => {
      this.request = null;
      if (this.state && this.frame) this.drawNow();
    });
  }

  drawNow() {
    const {canvas, frame, state, place, picture, window} = this;
    const made = [state.key, this.drawn, window?.center, window?.width, state.is_inverted].join();
    if (made !== this.made) paint(frame, window, state.is_inverted, picture);
    this.made = made;
    place.measure(canvas, state, frame.shape ?? [1, 1]);
    const context = canvas.getContext('2d');
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(...place.matrix);
    context.imageSmoothingEnabled = place.scale !== 1;
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, 0, 0, frame.columns * frame.step, frame.rows * frame.step);
    if (this.drawn === state.frame) this.hideText(context);
    canvas.dataset.matrix = place.matrix.join();
    canvas.dataset.shown = state.key;
    this.overlay.draw(this);
  }
}
