// Upload several files, a folder or a ZIP. Their names stay in the browser.

const SECOND_MS = 1000;

// All files of a drop, including those in folders.
export const droppedFiles = async (transfer) => {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      return files.push([entry.fullPath, file]);
    }
    const reader = entry.createReader();
    for (;;) { // a reader returns at most 100 entries at a time
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const each of some) await walk(each);
    }
  };
  for (const entry of entries) await walk(entry);
  return sorted(files);
};

// Files of an input in natural order of their names: 2 before 10.
export const chosenFiles = (input) =>
  sorted([...input.files].map((file) => [file.webkitRelativePath || file.name, file]));

const sorted = (named) => named
  .sort(([one], [other]) => one.localeCompare(other, undefined, {numeric: true}))
  .map(([, file]) => file);

export const isStudy = async (files) => {
  if (files.length !== 1) return true;
  const start = new Uint8Array(await files[0].slice(0, 4).arrayBuffer());
  return start[0] === 0x50 && start[1] === 0x4b && start[2] <= 8; // "PK": a ZIP
};

// Send files as one body and follow the progress of reading them. Returns {study} or {error}.
export const sendStudy = async (files, maxBytes, show) => {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (size > maxBytes) return {error: 'study_too_large'};
  const body = files.length === 1 && await isStudy(files) ? files[0] : framed(files);
  return run('page/study', body, show);
};

// Ask the server to read the files of a ticket, such as a series in a PACS.
export const fetchTicket = (ticket, show) => run(`page/study/${ticket}`, null, show);

const framed = (files) => new Blob(files.flatMap((file) => {
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, file.size, true);
  return [length.buffer, file];
}));

const run = (path, body, show) => new Promise((resolve) => {
  const request = new XMLHttpRequest();
  request.open('POST', new URL(path, document.baseURI));
  request.upload.onprogress = (event) => {
    const share = event.loaded / Math.max(1, event.total);
    if (share < 1) show(share, `Uploading: ${Math.round(100 * share)}%`);
    else show(0, 'Reading the images…');
  };
  let begun = null;
  request.onprogress = () => {
    const state = lastLine(request.responseText);
    if (!state?.of) return;
    begun ??= {at: performance.now(), read: state.read};
    show(state.read / state.of, `Reading: ${state.read} of ${state.of}${timeLeft(begun, state)}`);
  };
  request.onload = () => {
    const state = lastLine(request.responseText);
    resolve(state?.study || state?.error ? state : {error: 'upload_broken'});
  };
  request.onerror = request.onabort = () => resolve({error: 'upload_broken'});
  request.send(body);
});

const lastLine = (text) => {
  const lines = text.split('\n').slice(0, -1); // the text after the last line break is incomplete
  try { return JSON.parse(lines.at(-1)); } catch { return null; }
};

const timeLeft = (begun, {read, of}) => {
  const passed = performance.now() - begun.at;
  if (passed < SECOND_MS || read === begun.read) return '';
  return `, ${Math.ceil(passed / (read - begun.read) * (of - read) / SECOND_MS)} s left`;
};
