// Browser side of the web UI. Gradio components import this module by `script` in layout.py.
// It makes no requests to other servers. It stores a random tab token, the text being typed, and the theme.

import {keepTyped, keptTexts} from './conversation.js';
import {isOpenElsewhere, watchConnection} from './connection.js';
import {chosenFiles, droppedFiles, fetchTicket, isStudy, sendStudy} from './study.js';

const TAB_KEY = 'babydoctor-tab';
const THEME_KEY = 'babydoctor-theme';

const read = (storage, key) => {
  try { return storage.getItem(key); } catch { return null; }
};
const write = (storage, key, value) => {
  try { storage.setItem(key, value); } catch { /* storage is switched off: a reload starts a new conversation */ }
};

const newToken = () => Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (byte) => byte.toString(16).padStart(2, '0')).join('');

// An empty number box that loses focus gets its number back. Gradio would insert the end of the slider's range.
const keepNumbers = () => {
  const isNumber = (element) => element.matches?.('input[type=number]');
  const before = new WeakMap();
  document.addEventListener('focus', ({target}) => {
    if (isNumber(target)) before.set(target, target.value);
  }, true);
  document.addEventListener('blur', ({target}) => {
    if (!isNumber(target) || target.value !== '' || !before.get(target)) return;
    target.value = before.get(target);
    target.dispatchEvent(new Event('input', {bubbles: true}));
  }, true);
};

// The tab's token and typed texts, as JSON for the server. Created once after each load of the page.
// A browser copies the token with a tab. The copy takes a new one, because two tabs must not share a conversation.
let tab = null;
const identify = async () => {
  const stored = read(sessionStorage, TAB_KEY);
  const copied = stored !== null && await isOpenElsewhere(stored);
  const token = stored === null || copied ? newToken() : stored;
  write(sessionStorage, TAB_KEY, token);
  isOpenElsewhere.answerFor(token);
  return JSON.stringify({token, texts: keptTexts(), copied, reloaded: stored !== null});
};
const identity = () => tab ??= identify();

// Called on load: applies the stored theme and identifies the tab to the server.
export const restore = async (passed, preferences) => {
  keepNumbers();
  keepTyped();
  watchConnection();
  const theme = read(localStorage, THEME_KEY);
  if (theme) document.body.classList.toggle('dark', theme === 'dark');
  return [passed, preferences, await identity()];
};

// "Continue" identifies the tab, too, because a quick user presses it before the server has answered `restore`.
export const enter = async (agreed) => [agreed, await identity()];

export const toggleTheme = () => {
  const isDark = document.body.classList.toggle('dark');
  write(localStorage, THEME_KEY, isDark ? 'dark' : 'light');
};

export const download = (text) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/html'}));
  link.download = `babydoctor-session-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-')}.html`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// Upload the file into the server's memory. Gradio's own upload would write it to disk under its name.
const upload = (file, onProgress) => new Promise((resolve) => {
  const request = new XMLHttpRequest();
  request.open('POST', new URL('page/upload', document.baseURI));
  request.responseType = 'json';
  request.upload.onprogress = (event) => onProgress(event.loaded / Math.max(1, event.total));
  request.onload = () => resolve(request.response ?? {error: 'upload_broken'});
  request.onerror = request.onabort = () => resolve({error: 'upload_broken'});
  request.send(file);
});

export const dropZone = (element, trigger) => {
  const drop = element.querySelector('.bd-drop');
  const input = element.querySelector('input');
  const bar = element.querySelector('progress');
  const label = element.querySelector('.bd-progress span');
  const folder = element.querySelector('#bd-folder');
  const show = (share, text) => {
    drop.setAttribute('aria-busy', 'true');
    bar.value = share;
    label.textContent = text;
  };
  const showFile = (share) => show(share, share < 1 ? `Uploading: ${Math.round(100 * share)}%` : 'Reading the image…');
  const send = async (files) => {
    if (!files.length) return;
    let result = {error: 'upload_too_large'};
    if (await isStudy(files)) {
      show(0, 'Uploading…');
      result = await sendStudy(files, Number(drop.dataset.maxStudyBytes), show);
    } else if (files[0].size <= Number(drop.dataset.maxBytes)) {
      showFile(0);
      result = await upload(files[0], showFile);
    }
    input.value = folder.value = '';
    trigger('upload', result);
  };
  for (const each of [input, folder]) each.addEventListener('change', () => send(chosenFiles(each)));
  element.querySelector('[data-folder]').addEventListener('click', () => folder.click());
  drop.addEventListener('bd-ticket', async ({detail}) => {
    show(0, 'Fetching…');
    trigger('upload', await fetchTicket(detail, show));
  });
  for (const name of ['dragenter', 'dragover']) drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add('over');
  });
  for (const name of ['dragleave', 'drop']) drop.addEventListener(name, () => drop.classList.remove('over'));
  drop.addEventListener('drop', (event) => {
    event.preventDefault();
    // A folder that cannot be read counts as empty.
    droppedFiles(event.dataTransfer).then(
      (files) => (files.length ? send(files) : trigger('upload', {error: 'study_empty'})),
      () => trigger('upload', {error: 'upload_broken'}),
    );
  });
};

// Load the files of a ticket, with the progress display of an upload.
export const loadTicket = (ticket) => {
  if (ticket) document.querySelector('.bd-drop')?.dispatchEvent(new CustomEvent('bd-ticket', {detail: ticket}));
  return '';
};

// The server has answered: the image or a message is visible next to the drop zone.
export const uploadDone = () => document.querySelector('.bd-drop')?.removeAttribute('aria-busy');

// A single listener on the element survives changes of its content, and the pressed button keeps the focus.
export const buttons = (element, trigger) => {
  element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (!button) return;
    if (button.hasAttribute('aria-pressed')) {
      element.querySelectorAll('button[aria-pressed]').forEach((other) =>
        other.setAttribute('aria-pressed', String(other === button)));
    }
    trigger('select', {...button.dataset});
  });
};
