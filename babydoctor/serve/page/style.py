"""Words, colours and scripts of the page. System fonts only: nothing is fetched from other servers."""

from __future__ import annotations

from typing import Any

RESEARCH_NOTICE = (
    "Research use only. BabyDoctor is not a medical device. It makes mistakes that sound certain; never use its "
    "answers for diagnosis, treatment or any other decision about a patient."
)

GATE_TEXT = """
## Before you begin

BabyDoctor is a **research prototype** of a radiology vision-language model, trained on a small scale.

- It is **not a medical device** and has not been validated for any clinical task. Its answers are often wrong, and
  they sound just as certain when they are.
- **Never use an answer** for diagnosis, treatment, triage or any other decision about a patient.
- Load only images that you **may use for research**, without names or other identifying data. Header tags of DICOM
  files stay out of sight and are not sent to the model, but text that is burned into the pixels is part of the image.
- Images and conversations are kept **in memory only** and forgotten when this tab is closed. Feedback is saved only
  when you allow it.
"""

BURNED_IN_NOTE = (
    "Text burned into the pixels (names, dates) cannot be ruled out by this page. Look at the image before you ask."
)
BURNED_IN_WARNING = (
    "The file says that text is burned into its pixels. It may name a person, and the model would get it. "
    "Do not ask about this image unless it is anonymous."
)

OVERLAY_NOTE = (
    "Colour shows from which patches of the image the model drew most while it wrote, averaged over its layers and "
    "attention heads, and scaled to its own maximum. It does **not** show that the answer is right, nor why it was "
    "given: a wrong answer can look at the right place, and a right one elsewhere. It is as coarse as the model's "
    "patches and no outline of a finding."
)


def build_theme() -> Any:
    """Calm, with system fonts; contrast of text at least 4.5 : 1 in light and dark."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "Liberation Mono", "monospace"],
    ).set(
        body_background_fill="#f4f6f8",
        body_background_fill_dark="#0d1318",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161e25",
        block_border_color="#d9e0e6",
        block_border_color_dark="#2a353e",
        block_label_text_color="#334155",
        block_label_text_color_dark="#cbd5e1",
        block_title_text_weight="600",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14857b",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_border_color="#c3ccd5",
        button_secondary_border_color_dark="#3a4752",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10171d",
        input_border_color="#b6c2cc",
        input_border_color_dark="#3a4752",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
        background_fill_primary_dark="#161e25",
        background_fill_secondary_dark="#10171d",
        body_text_color_subdued="#52606d",
        body_text_color_subdued_dark="#9fb0be",
    )


CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: 12px 16px 24px !important; }
#bd-status:not(:has(.bd-status)), #bd-saved:not(:has(.bd-status)), #bd-overlay:not(:has(img)),
#bd-words:not(:has(button)), #bd-facts:not(:has(dl)), #bd-chat .top-panel { display: none !important; }
.gradio-container footer { display: none !important; }
:focus-visible { outline: 3px solid #0ea5a0 !important; outline-offset: 2px; }
.bd-sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

.gradio-container .html-container { padding: 0 !important; }
#bd-banner { position: sticky; top: 0; z-index: 30; margin: 0; }
.bd-banner { background: #fef3c7; color: #5b3a06; border: 1px solid #f2d27a; padding: 8px 14px;
  border-radius: 8px; font-size: 13px; line-height: 1.4; }
.dark .bd-banner { background: #3a2c0b; color: #fde9b3; border-color: #6b5318; }

#bd-header { align-items: end; gap: 12px; }
.bd-title h1 { font-size: 24px; line-height: 1.2; margin: 0; font-weight: 700; color: var(--body-text-color); }
.bd-title p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: 14px; }
#bd-gate { max-width: 720px; margin: 24px auto; background: var(--block-background-fill); padding: 24px 28px;
  border: 1px solid var(--block-border-color); border-radius: 12px; }
#bd-gate .prose { font-size: 15px; }
#bd-gate h2 { margin-top: 0; }

.bd-drop { display: flex; flex-wrap: wrap; align-items: center; justify-content: center; gap: 4px 10px; padding: 14px;
  border: 2px dashed #8aa0b2; border-radius: 10px; cursor: pointer; text-align: center; position: relative;
  background: var(--block-background-fill); color: var(--body-text-color); font-size: 15px; min-height: 56px; }
.bd-drop:hover, .bd-drop.over { border-color: #0f766e; background: rgba(20, 133, 123, .08); }
.bd-drop input { position: absolute; inset: 0; opacity: 0; cursor: pointer; width: 100%; height: 100%; }
.bd-drop:focus-within { outline: 3px solid #0ea5a0; outline-offset: 2px; }
.bd-drop small { color: var(--body-text-color-subdued); font-size: 13px; }

.bd-view { margin: 0; background: #000; border-radius: 10px; overflow: hidden;
  border: 1px solid var(--block-border-color); }
.bd-view .bd-stage { display: flex; justify-content: center; align-items: center; height: min(400px, 92vw); }
.bd-view .bd-layers { position: relative; height: 100%; display: flex; align-items: center; justify-content: center; }
.bd-view img { display: block; max-width: 100%; max-height: 100%; object-fit: contain; }
.bd-view img.bd-main { height: 100%; width: auto; }
.bd-view figcaption { background: #0b0f13; color: #d5dee6; font-size: 13px; padding: 6px 10px; line-height: 1.35; }
.bd-empty { height: min(400px, 60vw); display: flex; align-items: center; justify-content: center; color: #9fb0be;
  padding: 20px; text-align: center; font-size: 15px; }
.bd-overlay { display: grid; justify-items: center; background: #000; border-radius: 10px; overflow: hidden; }
.bd-overlay .bd-pair { position: relative; }
.bd-overlay .bd-pair img { position: absolute; inset: 0; width: 100%; height: 100%; }
.bd-overlay p { justify-self: stretch; margin: 0;
  background: #0b0f13; color: #d5dee6; font-size: 13px; padding: 6px 10px; }
.bd-scale { display: inline-block; width: 72px; height: 9px; margin: 0 6px; border-radius: 5px; vertical-align: middle;
  background: linear-gradient(90deg, rgba(255,237,111,.15), #ffed6f, #fd8d3c, #bd0026); }

.bd-facts { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 8px; padding: 0; }
.bd-facts div { background: var(--block-background-fill); border: 1px solid var(--block-border-color);
  border-radius: 999px; padding: 3px 11px; font-size: 13px; color: var(--body-text-color); }
.bd-facts dt { display: inline; color: var(--body-text-color-subdued); }
.bd-facts dt::after { content: ": "; }
.bd-facts dd { display: inline; margin: 0; font-weight: 600; }
.bd-note p { font-size: 13px !important; line-height: 1.5; color: var(--body-text-color-subdued); }
.bd-note { font-size: 13px; line-height: 1.45; color: var(--body-text-color-subdued); margin: 0 0 6px; }
.bd-note.strong { color: #9a3412; font-weight: 600; }
.dark .bd-note.strong { color: #fdba74; }
.bd-note summary { cursor: pointer; }

.bd-examples { display: flex; gap: 8px; overflow-x: auto; padding: 3px 3px 8px;
  scrollbar-width: thin; contain: inline-size; }
.bd-example { display: flex; flex-direction: column; flex: 0 0 92px;
  border: 1px solid var(--block-border-color); border-radius: 8px;
  overflow: hidden; padding: 0; background: var(--block-background-fill); color: var(--body-text-color);
  cursor: pointer; text-align: left; font-size: 12px; line-height: 1.25; font-weight: 400; }
.bd-example:hover { border-color: #0f766e; }
.bd-example img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; background: #000; display: block; }
.bd-example span { padding: 5px 7px 6px; }

.bd-chips { display: flex; flex-wrap: wrap; gap: 6px; }
.bd-chips button { border: 1px solid var(--input-border-color); background: var(--block-background-fill);
  cursor: pointer; color: var(--body-text-color); border-radius: 999px; padding: 5px 12px;
  font-size: 13.5px; line-height: 1.3; font-weight: 400; }
.bd-chips button { max-width: 100%; overflow-wrap: anywhere; text-align: left; }
.bd-chips button:hover { border-color: #0f766e; }
.bd-chips button[aria-pressed=true] { background: #0f766e; border-color: #0f766e; color: #fff; }
.bd-words { max-height: 150px; overflow-y: auto; padding: 3px; }

.bd-status { border-radius: 8px; padding: 9px 12px; font-size: 14px; line-height: 1.4; border: 1px solid transparent; }
.bd-status.error { background: #fdecea; border-color: #f0b5ae; color: #7a1c12; }
.dark .bd-status.error { background: #3b1713; border-color: #7a322a; color: #ffd2cb; }
.bd-status.info { background: #e6f4f1; border-color: #abd9d0; color: #0b4f48; }
.dark .bd-status.info { background: #0f2d2a; border-color: #22594f; color: #bdece3; }
#bd-chat .bubble-wrap { padding-top: 34px; }
#bd-chat .message { font-size: 15px; line-height: 1.5; }
#bd-chat .message p { white-space: pre-wrap; overflow-wrap: anywhere; }
#bd-ask { align-items: stretch; }
#bd-header #bd-model { padding: 6px 10px; }
#bd-stop { background: #b42318; color: #fff; }
.dark #bd-stop { background: #9f2a20; }

@media (max-width: 700px) {
  #bd-banner { position: static; }
  .bd-banner { font-size: 12.5px; padding: 7px 10px; }
  #bd-gate { padding: 18px 16px; margin: 12px 0; }
  #bd-main, #bd-header { flex-direction: column !important; align-items: stretch; }
  #bd-main > *, #bd-header > * { min-width: 0 !important; width: 100% !important; }
  #bd-header #bd-theme { align-self: flex-end; width: auto !important; }
  input, textarea, select { font-size: 16px !important; } /* iOS zooms in on smaller ones */
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

# Gradio puts its own class in front of our rules, and inside a media query that hides its container from them.
HEAD = """<style>@media (max-width: 700px) {
  .gradio-container { padding: 8px 4px 20px !important; }
  .gradio-container .fillable { padding: 4px 8px !important; }
}</style>"""

EXPORT_CSS = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:760px;margin:2rem auto;padding:0 1rem;color:#1c2733}"
    ".notice{background:#fef3c7;border:1px solid #f2d27a;border-radius:8px;padding:.6rem .9rem}"
    ".meta{color:#52606d;font-size:.85rem}figure{margin:1rem 0;background:#000;border-radius:8px;overflow:hidden}"
    "img{display:block;max-width:100%;max-height:480px;margin:0 auto}figcaption{color:#d5dee6;padding:.4rem .7rem;"
    "font-size:.85rem}section{border-top:1px solid #d9e0e6;margin-top:1rem}h2{font-size:1.05rem;margin:.8rem 0 .2rem}"
    ".answer{white-space:pre-wrap;margin:.2rem 0}dl div{display:inline-block;margin-right:1.2rem}dt{display:inline;"
    "color:#52606d}dt::after{content:': '}dd{display:inline;margin:0;font-weight:600}"
)

DROP_HTML = """
<label class="bd-drop"><input type="file" id="bd-file"
 aria-label="Load an image: PNG, JPEG or DICOM" aria-describedby="bd-drop-help">
<strong>Load an image</strong>
<small id="bd-drop-help">drop it here or press to choose · PNG, JPEG or DICOM</small></label>
"""

# The file goes straight into the server's memory: Gradio's own upload would write it to a disk, name and all.
DROP_SCRIPT = """
const drop = element.querySelector('.bd-drop');
const input = element.querySelector('input');
const send = async (file) => {
  if (!file) return;
  let result;
  if (file.size > MAX_BYTES) {
    result = {error: 'upload_too_large'};
  } else {
    drop.setAttribute('aria-busy', 'true');
    try {
      const response = await fetch(new URL('page/upload', document.baseURI), {method: 'POST', body: file});
      result = await response.json();
    } catch (error) {
      result = {error: 'upload_broken'};
    }
    drop.removeAttribute('aria-busy');
  }
  input.value = '';
  trigger('upload', result);
};
input.addEventListener('change', () => send(input.files[0]));
for (const name of ['dragenter', 'dragover']) drop.addEventListener(name, (event) => {
  event.preventDefault(); drop.classList.add('over');
});
for (const name of ['dragleave', 'drop']) drop.addEventListener(name, () => drop.classList.remove('over'));
drop.addEventListener('drop', (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); });
"""

# One listener on the element outlives new content, and the pressed button keeps the keyboard's focus.
BUTTONS_SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.hasAttribute('aria-pressed')) {
    element.querySelectorAll('button[aria-pressed]').forEach((other) =>
      other.setAttribute('aria-pressed', String(other === button)));
  }
  trigger('select', {...button.dataset});
});
"""

DOWNLOAD_SCRIPT = """
(page) => {
  if (!page) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([page], {type: 'text/html'}));
  link.download = 'babydoctor-session-' + new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-') + '.html';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
"""

THEME_SCRIPT = "() => { document.body.classList.toggle('dark'); }"
