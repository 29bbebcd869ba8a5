"""The application: API and page over one studio, behind the guard."""

from fastapi import FastAPI

from dsdiff.server.api import Api, add_errors
from dsdiff.server.guard import Guard
from dsdiff.server.options import ServerOptions
from dsdiff.server.studio import Studio


def build_app(studio: Studio, options: ServerOptions) -> Guard:
    """Return the ASGI application. With options.page it needs gradio."""
    app = FastAPI(title="DSDiff", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    add_errors(app)
    api = Api(studio)
    app.include_router(api.router)
    if options.page:
        from dsdiff.server.page import mount

        app = mount(app, studio, options)
    return Guard(app, options, lambda: studio.is_stopping)
