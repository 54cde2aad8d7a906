// The conversation: scrolls with a growing answer, copies, edits and deletes turns, keeps typed text, saves files.

const TEXTS_KEY = 'babydoctor-typed';
const NEAR_END_PX = 24;

const questionBox = () => document.querySelector('#bd-question textarea');

// Without https, navigator.clipboard exists on localhost only.
const copyText = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement('textarea');
  area.value = text;
  area.className = 'bd-sr';
  document.body.append(area);
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  if (!copied) throw new Error('not copied');
};

const copyAndSay = async (button, text) => {
  const label = button.dataset.label ??= button.textContent;
  try {
    await copyText(text);
    button.textContent = 'Copied';
  } catch {
    button.textContent = 'Not copied';
  }
  setTimeout(() => { button.textContent = label; }, 2000);
};

// Scroll with a growing answer only while the reader is at its end.
const followEnd = (box) => {
  let atEnd = true;
  box.addEventListener('scroll', () => {
    atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
  });
  const follow = () => { if (atEnd) box.scrollTop = box.scrollHeight; };
  new MutationObserver(follow).observe(box, {childList: true, subtree: true, characterData: true});
  follow();
};

export const chat = (element, trigger) => {
  const box = document.getElementById('bd-chat');
  followEnd(box);
  box.tabIndex = 0; // so that the keyboard can scroll it
  box.setAttribute('role', 'region');
  box.setAttribute('aria-label', 'Conversation');
  element.addEventListener('click', (event) => {
    const button = event.target.closest('.bd-turn button');
    if (!button) return;
    if ('copy' in button.dataset) {
      copyAndSay(button, button.dataset.copy);
      return;
    }
    if ('edit' in button.dataset) questionBox().focus();
    if ('delete' in button.dataset) box.focus();
    trigger('select', {...button.dataset});
  });
  // Arrow up in an empty box edits the last question. Escape cancels the edit.
  document.addEventListener('keydown', (event) => {
    if (event.target !== questionBox() || event.isComposing) return;
    if (event.key === 'ArrowUp' && event.target.value === '') {
      const last = [...element.querySelectorAll('[data-edit]')].pop();
      if (!last) return;
      event.preventDefault();
      last.click();
    } else if (event.key === 'Escape') {
      document.querySelector('#bd-turn-note [data-keep]')?.click();
    }
  });
};

export const turnNote = (element, trigger) => {
  element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (!button) return;
    ('keep' in button.dataset ? questionBox() : document.getElementById('bd-chat')).focus();
    trigger('select', {...button.dataset});
  });
};

export const copyAll = () => {
  const turns = [...document.querySelectorAll('#bd-chat .bd-message')].map((message) => {
    if (message.classList.contains('user')) return `Question: ${message.querySelector('p').textContent}`;
    const answer = message.querySelector('[data-copy]')?.dataset.copy ?? message.querySelector('.bd-answer').innerText;
    return `Answer: ${answer.trim()}\n(${message.querySelector('.bd-source > span').textContent})\n`;
  });
  const notice = document.querySelector('.bd-banner').textContent;
  copyAndSay(document.getElementById('bd-copy-all'), [notice, '', ...turns].join('\n'));
};

// Two buttons replace each other; the focus goes to the one that is visible.
export const moveFocus = (...ids) => {
  if (document.activeElement && document.activeElement !== document.body) return;
  setTimeout(() => ids.map((id) => document.getElementById(id)).find((button) => button?.offsetParent)?.focus());
};

// The texts that a reload brings back: id of the box -> text.
export const keptTexts = () => {
  try { return JSON.parse(sessionStorage.getItem(TEXTS_KEY)) ?? {}; } catch { return {}; }
};

export const keepText = (id, text) => {
  const texts = {...keptTexts(), [id]: text ?? ''};
  try { sessionStorage.setItem(TEXTS_KEY, JSON.stringify(texts)); } catch { /* storage is switched off */ }
};

// Keep each key press at once. Gradio reports a change later, and a reload may come first.
export const keepTyped = () => {
  document.addEventListener('input', ({target}) => {
    const box = target.closest?.('.bd-kept');
    if (box) keepText(box.id, target.value);
  }, true);
};

export const saveFile = (json) => {
  if (!json) return;
  const file = JSON.parse(json);
  const bytes = Uint8Array.from(atob(file.data), (letter) => letter.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], {type: file.type}));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
