"""Which server answers: an id drawn at each start, in /stats and in a header of every answer.

By it a client sees that two servers stand behind one address, or that the server was started anew, while it compares modes.
Prometheus' own label `instance`, the address that it scrapes, is another thing.
"""

import secrets

from flask import Flask, Response

HEADER = "BatchLab-Instance"


def register(app: Flask) -> None:
    app.config["INSTANCE"] = secrets.token_hex(4)

    @app.after_request
    def _(response: Response) -> Response:
        response.headers[HEADER] = app.config["INSTANCE"]
        return response
