"""stub"""
from dashboards.pages import Page
from dash import html
def render(context, view): return Page(html.Div("prompt"), "Prompt", "prompt")
def register(app, context): pass
