"""What the real SGLang answers, recorded in recordings.json; test_recordings.py holds it against the real one."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.sglang.faulty_proxy import Reply

PATH = Path(__file__).with_name("recordings.json")
MODEL = "MODEL"  # stands for the directory that a server was started with
_OUTSIDE = {"model_path": "/nowhere", "weight_version": "x", "flush_cache": True}
_SAMPLING = {"max_new_tokens": 4, "ignore_eos": True}
_PROMPT = {"input_ids": [0, 1], "return_logprob": True}


@dataclass(frozen=True)
class Exchange:
    """A request of the client, and the reply: JSON, or text."""

    method: str
    route: str
    body: Any = None
    has_key: bool = True
    status: int = 0
    reply: Any = None


# asked in this order, after which a server is as it was before
REQUESTS = {
    "what_it_is": Exchange("GET", "/server_info"),
    "load": Exchange(
        "POST", "/update_weights_from_disk", {"model_path": MODEL, "weight_version": "label", "flush_cache": True}
    ),
    "what_it_serves": Exchange("GET", "/model_info"),
    "response": Exchange("POST", "/generate", {**_PROMPT, "sampling_params": {**_SAMPLING, "temperature": 1.0}}),
    "two_tokens_at_1": Exchange(
        "POST",
        "/generate",
        {**_PROMPT, "token_ids_logprob": [0, 1], "sampling_params": {**_SAMPLING, "max_new_tokens": 1}},
    ),
    "two_tokens_at_half": Exchange(
        "POST",
        "/generate",
        {
            **_PROMPT,
            "token_ids_logprob": [0, 1],
            "sampling_params": {**_SAMPLING, "max_new_tokens": 1, "temperature": 0.5},
        },
    ),
    "too_long": Exchange("POST", "/generate", {**_PROMPT, "sampling_params": {"max_new_tokens": 100_000}}),
    "load_refused": Exchange("POST", "/update_weights_from_disk", _OUTSIDE),
    "end_of_nothing": Exchange("POST", "/end_weight_update", {}),
    "begin": Exchange("POST", "/begin_weight_update", {}),
    "begin_again": Exchange("POST", "/begin_weight_update", {}),
    "end": Exchange("POST", "/end_weight_update", {}),
    "checksums": Exchange("POST", "/weights_checker", {"action": "checksum"}),
    "abort": Exchange("POST", "/abort_request", {"rid": "none"}),
    "flush": Exchange("POST", "/flush_cache?timeout=10", {}),
    "no_such_route": Exchange("POST", "/no_such_route", {}),
    "no_key": Exchange("GET", "/model_info", has_key=False),
    "rename": Exchange("POST", "/update_weight_version", {"new_version": "default", "abort_all_requests": False}),
}
# of long replies, the fields that the client looks at; the others tell of the machine
_KEPT = {
    "/server_info": ("version", "tp_size", "pp_size", "context_length"),
    "/model_info": ("weight_version",),
}
_CHANGING = {"id": "0" * 32, "e2e_latency": 0.1, "response_sent_to_client_ts": 0.1}


def ask(exchange: Exchange, url: str, api_key: str, model: Path) -> Exchange:
    """With the reply of a server."""
    body = None if exchange.body is None else json.dumps(exchange.body).replace(MODEL, str(model)).encode()
    request = urllib.request.Request(url + exchange.route, body, {"content-type": "application/json"})
    request.method = exchange.method
    if exchange.has_key:
        request.add_header("authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    reply: Any = text
    with contextlib.suppress(ValueError):
        reply = json.loads(text)
    if status == 200 and exchange.route in _KEPT:
        reply = {name: reply[name] for name in _KEPT[exchange.route]}
    if isinstance(reply, dict) and "meta_info" in reply:
        reply["meta_info"] |= _CHANGING
    return Exchange(exchange.method, exchange.route, exchange.body, exchange.has_key, status, reply)


def save(exchanges: dict[str, Exchange]) -> None:
    PATH.write_text(json.dumps({name: asdict(each) for name, each in exchanges.items()}, indent=1) + "\n")


def load() -> dict[str, Exchange]:
    return {name: Exchange(**fields) for name, fields in json.loads(PATH.read_text()).items()}


def shape(value: Any) -> Any:
    """Fields and types of a reply, whatever the values."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in sorted(value.items())}
    if isinstance(value, list):
        distinct: list[Any] = []
        for each in map(shape, value):
            if each not in distinct:
                distinct.append(each)
        return distinct
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def recorded(name: str, **changes: Any) -> Reply:
    """As the real server replied, but for the values of some fields."""
    exchange = load()[name]
    assert set(changes) <= set(exchange.reply), f"{name} has no such field"
    if isinstance(exchange.reply, str):  # text, not JSON
        return Reply(exchange.status, exchange.reply)
    return Reply(exchange.status, json.dumps({**exchange.reply, **changes} if changes else exchange.reply))
