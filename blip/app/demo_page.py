"""The page of `blip demo`: layout and access control. Its functions are in `blip.app.demo`.

Only users of this machine are admitted unless `--host` says otherwise, files are served from one private folder, and
neither the page nor the server sends requests to other machines.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from blip.app.answers import shown as printable
from blip.app.demo import MOST_HITS, Demo, FolderHit
from blip.app.exit import one_line
from blip.app.web import MAX_BYTES, MAX_PIXELS, MOST_CAPTIONS, WAITING, Guard, admitted
from blip.data.images import NAMES
from blip.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from blip.inference.generate import CaptionText

_KEPT = 3600
"""Seconds for which an uploaded image is kept."""
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""Content-Security-Policy of the page: nothing is loaded from other servers."""
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_CSS = """
.answer{font-size:15px}.answer p{margin:2px 0}.answer table{width:100%;border-collapse:collapse}
.answer table,.answer table tr{border:0!important}
.answer table td,.answer table th{padding:7px 14px 7px 0!important;border:0!important;text-align:left;
border-bottom:1px solid var(--border-color-primary)!important;color:var(--body-text-color)}
.answer table .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.answer .track{width:34%;min-width:90px}.answer .track>div{background:var(--border-color-primary);border-radius:4px}
.answer .bar{display:block;height:8px;border-radius:4px;background:#059669;min-width:2px}
.answer ol{margin:0;padding-left:24px;list-style:decimal}.answer li{padding:6px 0}
.answer small{color:var(--body-text-color-subdued);margin-left:8px;white-space:nowrap}
.answer iframe{width:100%;height:80vh;border:1px solid var(--border-color-primary);border-radius:8px;background:#fff}
.answer .models{margin:0;padding:0;list-style:none}.answer .models li{overflow-wrap:anywhere}
.answer .problem{padding:10px 12px;border-left:4px solid #b45309}
.answer .hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:16px;padding:0;list-style:none}
.answer .hits img{width:100%;height:150px;object-fit:contain;background:var(--background-fill-secondary)}
.answer .hits figure{margin:0}.answer .hits figcaption{overflow-wrap:anywhere}
.dark button[role=tab][aria-selected=true]{color:var(--primary-300)!important}
.dark :focus-visible{outline-color:var(--primary-300)!important}
:focus-visible{outline:2px solid var(--color-accent)!important;outline-offset:2px}
footer{display:none!important}
"""
_NAMES = """() => {
  const name = () => document.querySelectorAll('#examples button:not([aria-label])').forEach(
    (button, i) => button.setAttribute('aria-label', 'Example ' + (i + 1)));
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""
"""Script that names the buttons of examples, which Gradio leaves without a name, for screen readers."""


def _theme() -> gr.themes.Base:
    """Gradio's own theme with text of at least 4.5:1 on its background."""
    return gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_700",
        color_accent_soft_dark="*neutral_700",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


# Access control ------------------------------------------------------------------------------------------------------


def upload() -> gr.Image:
    """An upload field that passes the file on unchanged; `blip.data.images` opens it, with its limits.

    The methods are set on the instance because Gradio writes a stub file next to the code of any subclass.
    """
    made = gr.Image(label="Image", sources=["upload", "clipboard"], type="filepath", height=360, buttons=["fullscreen"])
    keep = made.async_move_resource_to_block_cache

    async def keep_own(path: str | Path | None) -> str | None:
        if "://" in str(path or ""):
            line = "Images are not fetched from addresses; upload the file."
            raise gr.Error(line, title="Please check", print_exception=False)
        return await keep(path)

    made.async_move_resource_to_block_cache = keep_own
    made.preprocess = lambda payload: payload.path if payload else None
    return made


def _refusal(status: int, message: str) -> PlainTextResponse:
    return PlainTextResponse(message, status, {"connection": "close"})


def _is_refused(path: str) -> bool:
    """Whether a path would make the server fetch or run something."""
    return "proxy=" in path or ("file" in path and ":/" in path) or "/vibe-" in path


def _friendly(function: Callable, others: int = 0) -> Callable:
    """Show user errors in the first of the outputs; print other errors to the terminal, and point to it there.

    `others` is the number of further outputs, which are then emptied.
    """

    @functools.wraps(function)
    def answer(*values: Any, **named: Any) -> Any:
        try:
            return function(*values, **named)
        except (DataError, ValueError) as error:
            shown = f"<b>Please check:</b> {html.escape(one_line(error))}"
        except Exception:
            traceback.print_exc()
            shown = "<b>Something went wrong.</b> See the terminal in which blip demo runs."
        message = f'<p role="alert" class="problem">{shown}</p>'
        return (message, *[None] * others) if others else message

    return answer


@contextmanager
def serving(demo: Demo, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page while the context is open; gives its address, with the first free port from 7860 by default.

    OSError if it cannot listen there.
    """
    with (
        tempfile.TemporaryDirectory(prefix="openblip-demo-", ignore_cleanup_errors=True) as folder,
        _environment(folder),
    ):
        made = layout(demo, _examples(demo, Path(folder)))
        guard = {"hosts": admitted(host), "headers": _HEADERS, "refusal": _refusal, "refused_path": _is_refused}
        try:
            _, address, _ = made.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False).launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=MAX_BYTES,
                allowed_paths=[],
                strict_cors=True,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                app_kwargs={"middleware": [Middleware(Guard, **guard)], "docs_url": None, "redoc_url": None},
                theme=_theme(),
                css=_CSS,
                js=_NAMES,
            )
            yield address
        finally:
            made.close(verbose=False)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Set the environment variables that configure Gradio while the page is shown."""
    before = dict(os.environ)
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # it would expose folders that no option names
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": str(Path(folder, "examples"))}
    near = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))  # Gradio connects to itself once
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "NO_PROXY": ",".join(filter(None, (near, "127.0.0.1", "localhost"))),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(demo: Demo, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; uploaded images are deleted at the end."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with serving(demo, host, port) as address:
        say(f"{address} shows the page; press Ctrl-C to stop")
        threading.Event().wait()


# Layout ---------------------------------------------------------------------------------------------------------------


def layout(demo: Demo, examples: Sequence[str] = ()) -> gr.Blocks:
    """Build the page, without serving it; `examples` are paths of images to try."""
    model = {"concurrency_limit": 1, "concurrency_id": "model"}  # one request at a time uses the model
    with gr.Blocks(title="BLIP", analytics_enabled=False, delete_cache=(600, _KEPT), fill_width=False) as made:
        gr.Markdown("# BLIP\nDescribe images, ask questions about them, and find them by text.")
        gr.HTML(_about(demo), elem_id="models", elem_classes="answer", padding=False)
        with gr.Tab("An image"), gr.Row():
            with gr.Column(scale=2):
                image = upload()
                megapixels = MAX_PIXELS // 1_000_000
                gr.Markdown(f"{NAMES}; up to {MAX_BYTES >> 20} MB and {megapixels} million pixels.")
                if examples:
                    gr.Examples([[path] for path in examples], [image], label="Examples", elem_id="examples")
            with gr.Column(scale=3):
                _caption_tab(demo, image, model)
                _answer_tab(demo, image, model)
                _match_tab(demo, image, model)
                _explain_tab(demo, image, model)
        with gr.Tab("A folder"):
            _search_tab(demo, model)
        with gr.Tab("A CapFilt run"):
            _capfilt_tab(demo, made)
    return made


def _about(demo: Demo) -> str:
    lines = [f"<li><b>{html.escape(name)}</b>: {html.escape(about)}.</li>" for name, about in demo.models().items()]
    return f'<ul class="models">{"".join(lines)}</ul>'


def _examples(demo: Demo, folder: Path) -> list[str]:
    """Write the examples' files; returns their paths."""
    paths = [folder / f"example-{number}.png" for number, _ in enumerate(demo.examples(), 1)]
    for path, image in zip(paths, demo.examples(), strict=True):
        image.save(path)
    return list(map(str, paths))


def _caption_tab(demo: Demo, image: gr.Image, model: dict[str, Any]) -> None:
    with gr.Tab("Describe"):
        ways = [("most likely captions (beam search)", "beam"), ("varied captions (nucleus sampling)", "nucleus")]
        method = gr.Radio(ways, value="beam", label="Method")
        num = gr.Slider(1, MOST_CAPTIONS, value=3, step=1, label="Captions")
        with gr.Accordion("More", open=False):
            prompt = gr.Textbox(demo.prompt, label="Prompt that captions continue", max_length=200)
            with gr.Row():
                top_p = gr.Slider(0.1, 1.0, value=0.9, step=0.05, label="Probability mass to sample from (top-p)")
                seed = gr.Number(0, label="Random seed of sampling", precision=0)
        button = gr.Button("Describe it", variant="primary")
        output = gr.HTML(elem_id="captions", elem_classes="answer", min_height=40)

        def show(path: str | None, way: str, count: float, share: float, of: float, begin: str) -> str:
            texts = demo.caption(path, way, int(count), top_p=float(share), seed=int(of or 0), prompt=begin)
            return captions(texts)

        inputs = [image, method, num, top_p, seed, prompt]
        button.click(_friendly(show), inputs, output, api_name="caption", **model)


def captions(texts: list[CaptionText]) -> str:
    """Format captions as an HTML list."""
    rows = [
        f"<li>{html.escape(text.text) or '(empty)'} <small>log-probability {text.logprob:.2f}"
        f"{'' if text.finished else ', cut off at the maximum length'}</small></li>"
        for text in texts
    ]
    return f"<ol>{''.join(rows)}</ol>"


def _answer_tab(demo: Demo, image: gr.Image, model: dict[str, Any]) -> None:
    with gr.Tab("Ask"):
        if demo.vqa is None:
            gr.Markdown(
                "No VQA model is loaded. Start the page with one trained by `recipes.vqa`:\n\n"
                "```\nblip demo --model ... --vqa runs/vqa/model\n```"
            )
            return
        question = gr.Textbox(label="Question", placeholder="what is on the table?", max_length=300)
        button = gr.Button("Ask it", variant="primary")
        output = gr.HTML(elem_id="answers", elem_classes="answer", min_height=40)

        def show(path: str | None, words: str) -> str:
            rows = [(answer.text, answer.probability, "") for answer in demo.answer(path, words, 5)]
            return bars(("answer", "probability", ""), rows)

        for start in (button.click, question.submit):
            start(_friendly(show), [image, question], output, api_name="ask", **model)


def _match_tab(demo: Demo, image: gr.Image, model: dict[str, Any]) -> None:
    with gr.Tab("Match"):
        texts = gr.Textbox(
            label="Texts to compare, one per line", lines=4, placeholder="a dog on the beach\na cat", max_length=2000
        )
        button = gr.Button("Compare", variant="primary")
        output = gr.HTML(elem_id="matches", elem_classes="answer", min_height=40)

        def show(path: str | None, lines: str) -> str:
            return matches(demo.match(path, lines))

        button.click(_friendly(show), [image, texts], output, api_name="match", **model)


def matches(scored: list[tuple[str, float, float]]) -> str:
    """Format texts as an HTML table, the best match first."""
    rows = [(text, itm, f"{itc:.3f}") for text, itc, itm in sorted(scored, key=lambda one: -one[2])]
    return bars(("text", "fits (ITM)", "cosine (ITC)"), rows)


def bars(head: tuple[str, str, str], rows: list[tuple[str, float, str]]) -> str:
    """Format (text, share, more) rows as an HTML table, the share also as a bar."""
    cells = "".join(
        f'<tr><td>{html.escape(text)}</td><td class="track"><div><span class="bar" style="width:{100 * share:.1f}%">'
        f'</span></div></td><td class="n">{100 * share:.1f}%</td><td class="n">{more}</td></tr>'
        for text, share, more in rows
    )
    text, share, more = head
    return f'<table><tr><th>{text}</th><th colspan="2">{share}</th><th class="n">{more}</th></tr>{cells}</table>'


def _explain_tab(demo: Demo, image: gr.Image, model: dict[str, Any]) -> None:
    with gr.Tab("Explain"):
        text = gr.Textbox(label="Text to explain", placeholder="a dog next to a red bicycle", max_length=300)
        button = gr.Button("Show where", variant="primary")
        summary = gr.HTML(elem_id="looks", elem_classes="answer")
        maps = gr.HTML(elem_id="maps", elem_classes="answer")

        def show(path: str | None, words: str) -> tuple[str, str]:
            chance, shown = demo.explain_match(path, words)
            sentence = f"<p>Probability of a match: {100 * chance:.1f}%. Orange is evidence for it, grey is none.</p>"
            return sentence, _figures([(image, word, word) for word, image in shown])

        for start in (button.click, text.submit):
            start(_friendly(show, 1), [image, text], [summary, maps], api_name="look", **model)


def _figures(shown: Iterable[tuple[Image.Image, str, str]]) -> str:
    """Format images, each with its name and its caption, as an HTML grid."""

    def figure(image: Image.Image, name: str, caption: str) -> str:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        tag = f'<img src="{source}" alt="{html.escape(printable(name))}">'
        return f"<li><figure>{tag}<figcaption>{html.escape(printable(caption))}</figcaption></figure></li>"

    return f'<ol class="hits">{"".join(figure(*one) for one in shown)}</ol>'


def _search_tab(demo: Demo, model: dict[str, Any]) -> None:
    if demo.index is None:
        gr.Markdown("No folder is indexed. Start the page with one:\n\n```\nblip demo --model ... --folder photos\n```")
        return
    with gr.Row():
        text = gr.Textbox(label="Text to search for", placeholder="a red bicycle", max_length=300, scale=3)
        top = gr.Slider(1, MOST_HITS, value=12, step=1, label="Images", scale=2)
    button = gr.Button("Search", variant="primary")
    state = gr.HTML(_counted(*demo.counts()), elem_id="indexed", elem_classes="answer")
    gallery = gr.HTML(elem_id="found", elem_classes="answer", min_height=40)
    again = gr.Button("Index new and changed images", size="sm")

    def show(words: str, count: float) -> str:
        hits = enumerate(demo.search(words, int(count)), 1)
        return _figures([(hit.image, hit.name, _hit(n, hit)) for n, hit in hits])

    def refresh(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        def report(done: int, total: int) -> None:
            progress((done, total), desc="Indexing images", unit="images")

        return _counted(*demo.refresh(report))

    for start in (button.click, text.submit):
        start(_friendly(show), [text, top], gallery, api_name="search", **model)
    again.click(_friendly(refresh), None, state, api_name="refresh", **model)


def _counted(readable: int, unreadable: int) -> str:
    left = f"; {unreadable:,} files cannot be used" if unreadable else ""
    legend = "Below each result: name, the score that ranks it, and the probability of a match."
    return f"<p>{readable:,} images can be searched{left}. {legend}</p>"


def _hit(rank: int, hit: FolderHit) -> str:
    ranked_by = f"cosine {hit.score:.3f}" if hit.itm is None else f"match score {hit.score:.3f}, {100 * hit.itm:.1f}%"
    return f"{rank}. {hit.name}: {ranked_by}"


def _capfilt_tab(demo: Demo, made: gr.Blocks) -> None:
    if demo.run is None:
        gr.Markdown("No CapFilt run is open. Start the page with one:\n\n```\nblip demo --model ... --capfilt run\n```")
        return
    names = demo.reports()
    choice = gr.Dropdown(names, value=names[0] if names else None, label="Report", elem_id="report")
    button = gr.Button("Show", variant="primary")
    output = gr.HTML(elem_id="capfilt", elem_classes="answer")

    def show(name: str | None) -> str:
        # The report shows untrusted texts of a crawl, so it is sandboxed: an origin of its own, which `Guard` refuses.
        # Scripts are for its slider, and its own policy allows only those.
        content = html.escape(demo.report(name), quote=True)
        return f'<iframe sandbox="allow-scripts" title="CapFilt report" srcdoc="{content}"></iframe>'

    button.click(_friendly(show), choice, output, api_name="capfilt")
    made.load(lambda: gr.update(choices=demo.reports()), None, choice, api_visibility="private")
