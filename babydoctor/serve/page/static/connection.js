// Shows whether the connection to the server is lost or back, and detects copied tabs.

const LOST_KEY = 'babydoctor-lost';
const AGAIN_MS = 1000;
const SHOWN_MS = 15000;
const REPLY_MS = 200;
const LOCKED_MS = 5000;

const line = () => document.getElementById('bd-connection');
let isLost = false;
let hiding = 0;

const say = (name) => {
  const element = line();
  if (!element) return;
  clearTimeout(hiding);
  element.textContent = element.dataset[name];
  element.classList.toggle('info', name === 'back');
  element.classList.toggle('warning', name !== 'back');
  element.hidden = false;
  if (name !== 'lost') hiding = setTimeout(hide, SHOWN_MS);
};

const hide = () => {
  line().hidden = true;
  try { sessionStorage.removeItem(LOST_KEY); } catch { /* storage is switched off */ }
};

// Gradio reloads the page when the connection is back. A mark in the storage tells the new page why.
const watchConnectionOnce = () => {
  const fetchPlainly = window.fetch.bind(window);
  // Leaving the page aborts its own requests, which is not a lost connection.
  let isLeaving = false;
  window.addEventListener('pagehide', () => { isLeaving = true; });
  window.addEventListener('pageshow', () => { isLeaving = false; });
  const probe = async () => {
    try {
      await fetchPlainly(new URL('healthz', document.baseURI), {cache: 'no-store'});
      isLost = false;
      say('back');
    } catch { setTimeout(probe, AGAIN_MS); }
  };
  const lost = () => {
    if (isLost) return;
    isLost = true;
    try { sessionStorage.setItem(LOST_KEY, '1'); } catch { /* as above */ }
    say('lost');
    setTimeout(probe, AGAIN_MS);
  };
  window.fetch = async (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    try {
      const response = await fetchPlainly(...request);
      if (response.status >= 500 && url.includes('/run/predict')) say('failed');
      return response;
    } catch (error) {
      if (error.name !== 'AbortError' && !isLeaving && new URL(url, document.baseURI).origin === location.origin) lost();
      throw error;
    }
  };
  window.addEventListener('offline', lost);
  try { if (sessionStorage.getItem(LOST_KEY)) say('back'); } catch { /* as above */ }
};

let isWatching = false;
export const watchConnection = () => {
  if (!isWatching) watchConnectionOnce();
  isWatching = true;
};

// Each tab holds a lock named after its token and answers other tabs that ask for the token. A copied tab gets an
// answer; a reloaded tab gets the lock. Without https, browsers provide locks on localhost only.
const channel = 'BroadcastChannel' in window ? new BroadcastChannel('babydoctor-tabs') : null;
const hold = (token, options, onHeld = () => {}) => {
  const keep = (lock) => {
    if (!lock) return null;
    onHeld();
    return new Promise(() => {});
  };
  navigator.locks?.request(`babydoctor-tab-${token}`, options, keep).catch(() => {});
};

export const isOpenElsewhere = (token) => new Promise((resolve) => {
  if (!channel) return resolve(false);
  const waiting = new AbortController();
  const hear = ({data}) => { if (data?.taken === token) done(true); };
  const done = (result) => {
    channel.removeEventListener('message', hear);
    if (result) waiting.abort();
    resolve(result);
  };
  channel.addEventListener('message', hear);
  channel.postMessage({asked: token});
  hold(token, {signal: waiting.signal}, () => done(false));
  // A tab that holds its lock without answering is open, too.
  setTimeout(() => done(Boolean(navigator.locks)), navigator.locks ? LOCKED_MS : REPLY_MS);
});

isOpenElsewhere.answerFor = (token) => {
  hold(token, {ifAvailable: true});
  channel?.addEventListener('message', ({data}) => {
    if (data?.asked === token) channel.postMessage({taken: token});
  });
};
