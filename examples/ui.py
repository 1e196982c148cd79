"""A page that asks the base model and its adapters the same thing at the same time and shows them side by side.

python examples/ui.py --url http://127.0.0.1:3000 --port 7860
"""

from __future__ import annotations

import argparse
import html
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr
from local_api import Server, ServerError

BASE = "base"
REFRESH_S = 0.06
PROMPTS = (
    "Tell me a story about a shy fox who lost his red kite.",
    "Tell me a story about Luna the owl who was afraid of the dark.",
    "Tell me a story about a bear who wanted to learn to bake bread.",
    "Once upon a time, there was a tiny dragon",
)
CSS = """
html { scrollbar-gutter: stable; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; align-items: start; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
  box-shadow: inset 0 4px var(--tint); overflow: hidden; }
.card header { display: flex; justify-content: space-between; padding: .8rem .9rem .5rem; font-weight: 650; }
.card header span { font-weight: 400; opacity: .65; }
.card p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 0 .9rem .8rem; min-height: 7rem;
  line-height: 1.5; max-height: 32rem; overflow-y: auto; }
.card footer { padding: .5rem .9rem; font-size: .82rem; opacity: .8; border-top: 1px solid var(--border-color-primary);
  font-variant-numeric: tabular-nums; }
.card .error { color: #b3261e; font-weight: 600; opacity: 1; }
.card .running::after { content: "▍"; opacity: .6; }
"""
TINTS = ("#64748b", "#0f766e", "#b45309", "#6d28d9", "#be185d", "#1d4ed8", "#4d7c0f", "#b91c1c")


@dataclass
class Column:
    """One answer as it grows. Only the thread that reads its stream writes it; times are seconds of one clock."""

    name: str
    started: float
    text: str = ""
    tokens: int = 0
    first: float | None = None
    ended: float | None = None
    error: str = ""

    def add(self, text: str, now: float) -> None:
        """Take the text of one more token."""
        self.first = self.first or now
        self.tokens += 1
        self.text += text

    def speed(self) -> str:
        """Time to the first token and the rate after it, in words."""
        if self.first is None:
            return "waiting" if self.ended is None else "no tokens"
        first_ms = (self.first - self.started) * 1000
        spent = (self.ended or time.perf_counter()) - self.first
        rate = f" · {(self.tokens - 1) / spent:.0f} tokens/s" if self.tokens > 1 and spent > 0 else ""
        return f"{self.tokens} tokens · first after {first_ms:.0f} ms{rate}"


@dataclass(frozen=True)
class Ask:
    """What every column is asked: a text, whether it is a chat message, and the sampling controls."""

    prompt: str
    chat: bool
    tokens: int
    temperature: float  # 0 is greedy
    top_p: float  # 1 is off
    top_k: int  # 0 is off
    repetition: float  # 1 is off
    seed: int | None

    def parameters(self) -> dict:
        """The controls that are on, in the words of the route that is used."""
        fields: dict = {"max_tokens" if self.chat else "max_new_tokens": self.tokens}
        if self.temperature > 0:
            fields |= {"temperature": self.temperature} | ({} if self.chat else {"do_sample": True})
            fields |= {"top_p": self.top_p} if self.top_p < 1 else {}
            fields |= {"top_k": self.top_k} if self.top_k > 0 else {}
            fields |= {"seed": self.seed} if self.seed is not None else {}
        elif self.chat:
            fields["temperature"] = 0
        if self.repetition != 1:
            fields["repetition_penalty"] = self.repetition
        return fields

    def pieces(self, server: Server, adapter: str | None) -> Iterator[str]:
        """The answer's text, one piece for each token."""
        if self.chat:
            yield from server.stream_chat([{"role": "user", "content": self.prompt}], adapter, **self.parameters())
        else:
            for event in server.stream(self.prompt, adapter, **self.parameters()):
                yield "" if event["token"]["special"] else event["token"]["text"]


def answer(server: Server, ask: Ask, column: Column, stop: threading.Event) -> None:
    """Stream one answer into its column until it ends, fails or `stop` is set; never raises."""
    pieces = ask.pieces(server, None if column.name == BASE else column.name)
    try:
        for piece in pieces:
            column.add(piece, time.perf_counter())
            if stop.is_set():
                break
    except (ServerError, OSError, ValueError, KeyError) as error:
        column.error = str(error) or type(error).__name__
    finally:
        pieces.close()  # type: ignore[attr-defined]
        column.ended = time.perf_counter()


def race(server: Server, ask: Ask, names: list[str]) -> Iterator[list[Column]]:
    """Ask all names at once and yield the columns as they fill; closing the iterator cancels every request."""
    stop = threading.Event()
    columns = [Column(name, started=time.perf_counter()) for name in names]
    threads = [threading.Thread(target=answer, args=(server, ask, column, stop), daemon=True) for column in columns]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            yield columns
            time.sleep(REFRESH_S)
        yield columns
    finally:
        stop.set()


def cards(columns: list[Column]) -> str:
    """The columns as HTML; everything that came from a model or a server is escaped."""
    return f'<div class="cards">{"".join(card(column, TINTS[i % len(TINTS)]) for i, column in enumerate(columns))}</div>'


def card(column: Column, tint: str) -> str:
    """One column: its name, its text, and its speed or its error."""
    running = column.ended is None
    state = "writing" if running else "failed" if column.error else "done"
    foot = f'<footer class="error">{html.escape(column.error)}</footer>' if column.error else f"<footer>{column.speed()}</footer>"
    return (
        f'<section class="card" style="--tint: {tint}"><header>{html.escape(column.name)}<span>{state}</span></header>'
        f'<p class="{"running" if running else ""}">{html.escape(column.text.strip())}</p>{foot}</section>'
    )


def menu(server: Server) -> tuple[list[tuple[str, str]], str]:
    """The adapters that can be chosen as (label, name), and a line on the server or on why it cannot be asked."""
    try:
        model, adapters = server.info()["model_id"], server.adapters()
    except (ServerError, OSError, ValueError, KeyError) as error:
        return [], f"**No answer:** {error}"
    usable = [adapter for adapter in adapters if adapter.get("state") not in ("failed", "draining", "gone")]
    return [(label(adapter), adapter["name"]) for adapter in usable], f"`{model}` at {server.url}, {len(usable)} adapters"


def label(adapter: dict) -> str:
    """An adapter's name with its rank, where the server tells it."""
    low, high = adapter.get("rank_min"), adapter.get("rank_max")
    if not high:
        return adapter["name"]
    return f"{adapter['name']} (rank {high if low == high else f'{low} to {high}'})"


def page(server: Server) -> gr.Blocks:
    """The page; it asks the server for its adapters each time it is opened or refreshed."""

    def refresh(chosen: list[str] | None):
        choices, line = menu(server)
        names = [name for _, name in choices]
        kept = names if chosen is None else [name for name in chosen if name in names]
        return gr.Dropdown(choices=choices, value=kept), line

    def opened():
        return refresh(None)

    def compare(prompt, mode, adapters, tokens, temperature, top_p, top_k, repetition, seed):
        ask = Ask(
            prompt, mode == "chat message", int(tokens), temperature, top_p, int(top_k), repetition, None if seed is None else int(seed)
        )
        for columns in race(server, ask, [BASE, *adapters]):
            yield cards(columns)

    with gr.Blocks(title="kv.run: base and adapters side by side", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("## One base model, many adapters, one running batch")
        line = gr.Markdown()
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=3, autofocus=True)
                gr.Examples([[text] for text in PROMPTS], prompt, label="Try")
            with gr.Column(scale=2):
                with gr.Row():
                    adapters = gr.Dropdown([], label="Adapters beside the base", multiselect=True, scale=5)
                    again = gr.Button("Refresh", scale=1, min_width=90)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary")
                    halt = gr.Button("Stop")
        with gr.Accordion("Sampling", open=False), gr.Row():
            mode = gr.Radio(["plain text", "chat message"], value="plain text", label="Prompt is")
            tokens = gr.Slider(8, 1024, 256, step=8, label="Most new tokens")
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0 is greedy)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p (1 is off)")
            top_k = gr.Slider(0, 200, 0, step=1, label="Top k (0 is off)")
            repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty (1 is off)")
            seed = gr.Number(None, label="Seed (empty: another each time)", precision=0)
        out = gr.HTML(cards([]))
        controls = [prompt, mode, adapters, tokens, temperature, top_p, top_k, repetition, seed]
        blocks.load(opened, None, [adapters, line])
        again.click(refresh, adapters, [adapters, line])
        running = gr.on([go.click, prompt.submit], compare, controls, out, show_progress="hidden", concurrency_limit=8)
        halt.click(None, cancels=[running])
    return blocks


def main() -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="the kv.run server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    # Local fonts only, so that the page works without a network.
    theme = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page(Server(args.url, os.environ.get("API_KEY"))).queue().launch(
        server_name=args.host, server_port=args.port, theme=theme, css=CSS, footer_links=[], ssr_mode=False
    )


if __name__ == "__main__":
    main()
