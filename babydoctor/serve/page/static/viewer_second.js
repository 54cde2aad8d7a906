// The second viewport: a series for comparison. The model does not receive it, so its state is not sent to the server.

import {current, Viewer} from './viewer.js';

export const second = (element, trigger) => {
  current.second?.close();
  current.second = new SecondViewer(element.querySelector('.bd-screen'), trigger);
};

const SAID = {
  position: 'Linked by position.',
  distance: 'Linked by distance from here: the two do not share a frame of reference.',
  index: 'Linked by image number: positions are missing.',
  none: 'Not linked: the planes differ.',
};

class SecondViewer extends Viewer {
  constructor(screen, trigger) {
    super(screen, trigger, 'bd-second');
    this.isLinked = true;
    this.link = null;
    this.actions = {
      link: () => this.toggle(),
      swap: () => this.trigger('select', {do: 'swap', state: this.shown()}),
      close: () => this.trigger('select', {do: 'close'}),
      region: () => {},
      whole: () => {},
    };
    this.follow = (event) => this.onShown(event.detail);
    document.addEventListener('bd-shown', this.follow);
  }

  close() {
    super.close();
    document.removeEventListener('bd-shown', this.follow);
  }

  // The server does not need the state of this viewport.
  send() {
    clearTimeout(this.timer);
    this.timer = null;
    this.isSettled(true);
  }

  toggle() {
    this.isLinked = !this.isLinked;
    this.screen.querySelector('[data-do=link]').setAttribute('aria-pressed', String(this.isLinked));
    this.connect();
  }

  // Ask the server how the two series are linked, and start from their current positions.
  async connect() {
    const {main} = this;
    const keys = [main?.state?.key, this.state?.key];
    this.keys = keys.join();
    this.link = null;
    if (!keys[0] || !keys[1] || !this.isLinked) return this.say(this.isLinked ? '' : 'Not linked.');
    const address = new URL(`page/link/${keys[0]}/${keys[1]}`, document.baseURI);
    const link = await fetch(address).then((response) => (response.ok ? response.json() : null)).catch(() => null);
    if (!link || this.keys !== keys.join() || !this.isLinked) return;
    if (link.by === 'position') link.shift = 0;
    if (link.by === 'distance') link.shift = link.second[this.state.frame] - link.first[main.state.frame];
    if (link.by === 'index') link.shift = this.state.frame - main.state.frame;
    this.link = link;
    this.say(SAID[link.by]);
    if (link.by === 'position') this.move(main, this);
  }

  get main() { return current.viewer; }

  onShown(viewer) {
    const {main} = this;
    if (!this.state || !main?.state || this.isFollowing) return;
    if (this.keys !== [main.state.key, this.state.key].join()) return void this.connect();
    if (viewer === main) this.move(main, this);
    else if (viewer === this) this.move(this, main);
  }

  // Scroll `to` to the image that corresponds to the one of `from`.
  move(from, to) {
    const frame = this.partner(from.state.frame, from === this);
    if (frame === null || frame === to.state.frame) return;
    this.isFollowing = true;
    to.direction = Math.sign(frame - to.state.frame);
    to.change({frame});
    this.isFollowing = false;
  }

  // The image that corresponds to an image of the first series or, with `isBack`, of the second one.
  partner(frame, isBack) {
    const {link} = this;
    if (!link || link.by === 'none') return null;
    const shift = isBack ? -link.shift : link.shift;
    if (link.by === 'index') {
      const last = (isBack ? this.main : this).state.frames - 1;
      return Math.min(Math.max(frame + shift, 0), last);
    }
    const [from, to] = isBack ? [link.second, link.first] : [link.first, link.second];
    const wanted = from[frame] + shift;
    let best = 0;
    to.forEach((place, i) => { if (Math.abs(place - wanted) < Math.abs(to[best] - wanted)) best = i; });
    return best;
  }

  say(text) {
    const note = this.screen.querySelector('.bd-link-note');
    if (note.textContent !== text) note.textContent = text;
  }
}
