"""The form of the pages that take a prompt: a text, or a chat with its tools; assets/25_prompt.js runs it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboards.components.controls import button
from dashboards.conversations import form_turns
from dashboards.prompts import Asked
from dashboards.uploads import MAX_FILE_BYTES

__all__ = ["file_chips", "invitation", "prompt_form", "prompt_stores"]

NAMES = ("text", "chat", "text2", "chat2", "window", "media")
"""What of an address says what to run."""


def prompt_form(
    first: Asked,
    second: Asked | None = None,
    *,
    run: str = "prompt-run",
    files: Sequence[tuple[str, str]] | None = None,
) -> html.Div:
    """Fields for one prompt, or for two where `second` is given, even if it is empty.

    Args:
        first: what stands in the first one.
        second: what stands in the other; None for a page that takes one prompt.
        run: id of the button.
        files: digest and name of its images and sounds; None for a page, or a model, that takes none.
    """
    chat = first.chat or (second is not None and second.chat)
    compared = second is not None and bool(second.text)
    editors = [_editor(first, "", "A")]
    switches: list[Any] = [
        html.Div(
            [
                button("Text", **{"data-mode": "text", "aria-pressed": str(not chat).lower()}),
                button("Chat", **{"data-mode": "chat", "aria-pressed": str(chat).lower()}),
            ],
            className="chips",
            role="group",
            **{"aria-label": "What the prompt is"},
        )
    ]
    if second is not None:
        editors.append(_editor(second, "2", "B"))
        switches.append(button("Compare two", **{"data-compare": "true", "aria-pressed": str(compared).lower()}))
    return html.Div(
        className="prompt-form" + (" as-chat" if chat else "") + (" compared" if compared else ""),
        children=[
            html.Div(switches, className="prompt-switches"),
            html.Div(editors, className="prompt-editors"),
            *([] if files is None else [_files_part(files)]),
            html.Div(
                className="chips",
                children=[
                    button("Run", id=run, className="main-action", **{"data-run": "true"}),
                    html.Span([html.Kbd("Ctrl"), " ", html.Kbd("Enter")], className="muted small keys-hint"),
                ],
            ),
        ],
    )


def _files_part(files: Sequence[tuple[str, str]]) -> html.Div:
    """A button that takes images and sounds, and those that were handed over (`dashboards.components.prompt_files`)."""
    return html.Div(
        className="prompt-files chips",
        children=[
            dcc.Upload(
                button("Add an image or a sound", className="tiny"),
                id="prompt-upload",
                accept="image/*,.wav",
                max_size=MAX_FILE_BYTES,
            ),
            # The browser leaves out a larger file without a word.
            html.Span(f"images and WAV files of up to {MAX_FILE_BYTES // 2**20} MiB", className="muted small"),
            html.Div(file_chips(files), id="prompt-file-chips", className="chips"),
            html.Span(id="prompt-file-problem", className="small", role="alert"),
            dcc.Store(id="prompt-files", data=[list(one) for one in files]),
        ],
    )


def file_chips(files: Sequence[Sequence[str]]) -> list[Any]:
    """Files that were handed over, each with a button that lets it go."""
    return [
        button(html.Bdi(name), " ×", label=f"Remove {name}", className="tiny", **{"data-remove-file": digest})
        for digest, name in files
    ]


def _editor(asked: Asked, suffix: str, name: str) -> html.Div:
    turns, tools = form_turns(asked.text) if asked.chat else ([], "")
    return html.Div(
        className="prompt-editor",
        **{"data-suffix": suffix},
        children=[
            html.Span(name, className="prompt-letter", **{"aria-hidden": "true"}),
            dmc.Textarea(
                id=f"prompt-text{suffix}",
                value="" if asked.chat or asked.window else asked.text,
                className="prompt-text",
                placeholder="Type a text to run through the model",
                autosize=True,
                minRows=2,
                maxRows=10,
                attributes={
                    "input": {
                        "aria-label": f"Prompt {name}" if suffix else "Prompt",
                        "data-focus": "prompt",
                        "spellCheck": "false",
                        "dir": "auto",
                    }
                },
            ),
            html.Div(
                className="chat-editor",
                children=[
                    html.Div(className="turns", **{"data-turns": json.dumps(turns, ensure_ascii=False)}),
                    html.Div(
                        [
                            button("Add a turn", className="tiny", **{"data-add-turn": "true"}),
                            button("Tools", className="tiny", **{"data-chat-open": "tools", "aria-expanded": "false"}),
                            button(
                                "Paste a conversation",
                                className="tiny",
                                **{"data-chat-open": "paste", "aria-expanded": "false"},
                            ),
                        ],
                        className="chips",
                    ),
                    html.Div(className="chat-tools", **{"data-tools": tools}),
                    html.Div(className="chat-paste", **{"data-paste": "true"}),
                    html.P(className="chat-problem small", role="alert"),
                ],
            ),
        ],
    )


def prompt_stores(page: str, index: str, query: Mapping[str, str], poll_ms: int, *more: str) -> list[Any]:
    """What such a page keeps: PAGE-request, what to run; PAGE-selection, the address's query; PAGE-poll, which asks for
    news of what runs every `poll_ms` milliseconds; and more empty stores."""
    request = {"index": index, **{name: query[name] for name in NAMES if query.get(name)}}
    return [
        dcc.Store(id=f"{page}-request", data=request),
        dcc.Store(id=f"{page}-selection", data=query),
        *(dcc.Store(id=f"{page}-{name}") for name in more),
        dcc.Interval(id=f"{page}-poll", interval=poll_ms, disabled=True),
    ]


def invitation(words: str, samples: Sequence[str | tuple[str, str]]) -> html.Div:
    """What stands there before anything has been run: samples to start with; a pair is compared."""
    chips = []
    for sample in samples:
        first, second = (sample, None) if isinstance(sample, str) else sample
        label = first.replace("\n", " ⏎ ") + (f"  |  {second}" if second else "")
        chips.append(button(label, **{"data-sample": first, **({"data-sample2": second} if second else {})}))
    return html.Div(className="state", children=[html.P(words, className="muted"), html.Div(chips, className="chips")])
