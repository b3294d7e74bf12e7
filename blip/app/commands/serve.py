"""`blip serve`: captions, answers, match scores and embeddings over HTTP."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass

from blip.app.commands.shared import ModelOptions, at_least
from blip.options import option

EXAMPLE = """examples:
  blip serve --model runs/demo/captioner/model
  blip serve --model runs/retrieval/model --vqa runs/vqa/model --host 0.0.0.0 --port 80

POST /v1/caption, /v1/answer, /v1/match and /v1/embed take an image as a form or as JSON; GET /health says whether the
model is loaded, and /openapi.json describes everything. Requests of all clients share batches; a result is that of the
command with the same options. Only this machine can reach the service, unless --host admits others: it has no password
and no encryption. Nothing is fetched or written. SIGTERM finishes what is in work.
Exit status: 0 after SIGTERM, 2 for wrong use, 130 after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """Serve a model over HTTP."""

    vqa: str | None = option(None, metavar="DIR")
    """Model for questions, trained by recipes.vqa"""
    host: str = "127.0.0.1"
    """Address to listen at; 127.0.0.1 can only be reached from this machine"""
    port: int = option(8000, metavar="N")
    """Port; 0 for any that is free"""
    batch: int = option(16, metavar="N")
    """Most requests that go through the model together"""
    wait_ms: int = option(10, metavar="N")
    """Milliseconds for which a request waits for others to share its batch"""

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        at_least(0, port=self.port, wait_ms=self.wait_ms)


def run(chosen: ServeOptions) -> int:
    """Listen, load the models and serve until stopped."""
    from blip.app.web import admitted, is_local, listening, model_name
    from blip.installed import require

    require("serve", "blip serve")
    name, vqa = model_name(chosen.model), model_name(chosen.vqa) if chosen.vqa else None
    opened = listening(chosen.host, chosen.port)

    # After the checks that need no torch, so that their errors come at once.
    from blip.app.loaded import load
    from blip.app.service import Models, Served, Service, serve

    def models() -> Models:
        ways = {"device": chosen.device, "precision": chosen.precision, "tokenizer": chosen.tokenizer}
        main = Served(load(chosen.model, kind=None, batch=chosen.batch, **ways), name)
        return Models(main, Served(load(chosen.vqa, kind=None, batch=chosen.batch, **ways), vqa) if vqa else None)

    address = f"[{chosen.host.strip('[]')}]" if ":" in chosen.host else chosen.host
    if not is_local(chosen.host):
        line = f"anyone who can reach {chosen.host} can use the service: it has no password and no encryption"
        print(line, file=sys.stderr, flush=True)
    print(
        f"http://{address}:{opened.getsockname()[1]} serves {name} once it is loaded; press Ctrl-C to stop", flush=True
    )
    service = Service(batch=chosen.batch, wait=chosen.wait_ms / 1000, hosts=admitted(chosen.host))
    signal.signal(signal.SIGTERM, lambda *_: None)  # the server stops by itself; afterwards it is no error
    serve(service, opened, models)
    return 0
