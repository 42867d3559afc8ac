"""The routes of files and batches over a real store, with no engine behind them: what they keep is not run."""

from pathlib import Path

from flask import Flask

from api import batches, errors, files
from jobs.store import Store


class Runner:
    """Stands where the server has the one that runs batches; remembers how often it was woken."""

    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


def create_store_app(folder: Path) -> Flask:
    app = Flask("store", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["store"] = Store(folder)
    app.extensions["runner"] = Runner()
    errors.register(app)
    app.register_blueprint(files.blueprint)
    app.register_blueprint(batches.blueprint)
    return app
