"""The page: controls, and a column of live text for each model.

Nothing on it comes from elsewhere: system fonts, no analytics, and a content security policy that
lets a browser ask this server alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from composer_gpt2.demo.token_html import STYLE, text_html
from composer_gpt2.generation import Piece, Sampling, TextGenerator

__all__ = ["build_page", "check_installed", "launch", "model_names"]

N_ALTERNATIVES = 5
_SECONDS_BETWEEN_UPDATES = 0.05  # a page is sent as a whole each time
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:"
)


def check_installed() -> None:
    """Refuses to go on without Gradio.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("demo needs gradio; run: pip install 'composer-gpt2[demo]'")


def build_page(writers: Mapping[str, TextGenerator]) -> Any:
    """A ``gradio.Blocks`` that writes with one or more models.

    Args:
        writers: Each model's name on the page.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    import gradio as gr  # type: ignore[reportMissingImports]

    def write(*values: Any) -> Iterator[list[str]]:
        try:
            yield from _write(writers, *values)
        except ValueError as error:  # a prompt that is too long, a stop string too many
            raise gr.Error(str(error), print_exception=False) from error

    lengths = [w.context_length for w in writers.values() if w.context_length is not None]
    longest = min(lengths, default=2049) - 1
    with gr.Blocks(title="composer-gpt2", analytics_enabled=False) as page:
        gr.Markdown("### " + " and ".join(_code(name) for name in writers))
        prompt = gr.Textbox("", label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            max_new_tokens = gr.Slider(
                1, longest, min(100, longest), step=1, label="New tokens", elem_id="new-tokens"
            )
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature", elem_id="temperature")
            top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", elem_id="top-p")
            typical_p = gr.Slider(0.01, 1, 1, step=0.01, label="Typical-p", elem_id="typical-p")
        with gr.Row():
            top_k = gr.Number(0, label="Top-k", precision=0, minimum=0, elem_id="top-k")
            seed = gr.Number(None, label="Seed", precision=0, elem_id="seed")
            stop = gr.Textbox("", label="Stop strings", lines=2, elem_id="stop")
            with gr.Column():
                start = gr.Button("Write", variant="primary", elem_id="write")
                end = gr.Button("Stop", elem_id="end")
        gr.Markdown(
            "Temperature 0 takes the likeliest token each time. Top-p 1, typical-p 1 and top-k 0 "
            "are off. Without a seed each text is another. Stop strings stand one in a line."
        )
        outputs = []
        with gr.Row(equal_height=False):
            for number, name in enumerate(writers):
                with gr.Column():
                    gr.Markdown(_code(name))
                    outputs.append(gr.HTML("", elem_id=f"text-{number}", min_height=160))
        inputs = [prompt, max_new_tokens, temperature, top_k, top_p, typical_p, seed, stop]
        events = [
            trigger(write, inputs, outputs, show_progress="hidden", concurrency_limit=1)
            for trigger in (start.click, prompt.submit)
        ]
        end.click(None, cancels=cast(Any, events), queue=False)
    return page


def launch(
    page: Any,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    block: bool = True,
) -> str:
    """Serves a page until it is interrupted.

    Args:
        page: From :func:`build_page`.
        host: Who may ask: ``127.0.0.1`` is this machine alone, ``0.0.0.0`` everybody.
        port: Default: the first free one from 7860 on.
        share: Whether Gradio's servers give it a public address, for which it downloads a program.
        block: Whether to return only when it ends.

    Returns:
        Its address.

    Raises:
        OSError: The port is not free.
    """
    import gradio as gr  # type: ignore[reportMissingImports]
    from starlette.middleware import Middleware  # type: ignore[reportMissingImports]

    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=fonts, font_mono=mono),
        css=STYLE,
        app_kwargs={"middleware": [Middleware(_OnlyThisServer)]},
    )
    print(f"Open {public or local} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return local


def _write(
    writers: Mapping[str, TextGenerator],
    prompt: str,
    max_new_tokens: float,
    temperature: float,
    top_k: float | None,
    top_p: float,
    typical_p: float,
    seed: float | None,
    stop: str,
) -> Iterator[list[str]]:
    """The HTML of each column, again and again until all have ended."""
    sampling = Sampling(
        temperature,
        int(top_k) if top_k else None,
        top_p if top_p < 1 else None,
        typical_p if typical_p < 1 else None,
    )
    streams = [
        writer.stream(
            [prompt],
            max_new_tokens=int(max_new_tokens),
            sampling=sampling,
            seed=None if seed is None else int(seed),
            stop=[line for line in stop.splitlines() if line],
            n_alternatives=N_ALTERNATIVES,
        )
        for writer in writers.values()
    ]
    written: list[list[Piece]] = [[] for _ in streams]

    def columns() -> list[str]:
        return [
            text_html(prompt, pieces, writer.codec.decode)
            for pieces, writer in zip(written, writers.values(), strict=True)
        ]

    shown_at = 0.0
    for pieces in itertools.zip_longest(*streams):  # the models take turns
        for column, piece in zip(written, pieces, strict=True):
            if piece is not None:
                column.append(piece)
        if time.monotonic() - shown_at > _SECONDS_BETWEEN_UPDATES:
            shown_at = time.monotonic()
            yield columns()
    yield columns()


def _code(name: str) -> str:
    return f"`{name.replace('`', '')}`"


class _OnlyThisServer:
    """ASGI middleware: the page may load from, and talk to, where it came from, and nobody else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def model_names(checkpoints: Sequence[str]) -> list[str]:
    """A name for each, as given; a number behind those that are the same."""
    return [
        name if checkpoints.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(checkpoints, 1)
    ]
