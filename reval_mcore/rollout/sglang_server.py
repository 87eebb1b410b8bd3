"""One SGLang server over HTTP: its routes, what it can do, and its errors in one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

UPDATING = "updating"  # label of a server with half a version, or with a whole one and what it cached of another
_PROBE_TOKEN_IDS = (0, 1)


class ServerError(Exception):
    """A server did not do what it was asked. One line: its URL, what was asked, what came of it."""

    def __init__(self, message: str, status: int | None = None, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.status = status  # of HTTP; None where no answer came
        self.was_sent = was_sent  # False: it cannot have heard of it


class NoAnswerError(ServerError):
    """No answer came: it may be gone, or hang."""


class BrokenConnectionError(NoAnswerError):
    """The connection ended before an answer: the server is gone, or only the connection is."""


class NoWeightsError(ServerError):
    """It has not got the weights that are wanted, through no fault of its own: they are still to be brought."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says about itself."""

    version: str  # of SGLang
    num_ranks: int  # processes that hold weights, which join a weight-update group
    weights: str  # label of the weights that it serves
    context_length: int  # 0: not told
    needs_begin_and_end: bool  # a distributed weight update lies between /begin_weight_update and /end_weight_update


class SGLangServer:
    """Every method raises ServerError. `api_key` goes with every request; "" for none."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers=headers,
            # a server closes idle connections after 5 s; one that is just being closed must not be used
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            timeout=None,  # given with each request
            trust_env=False,  # a proxy for the outside world is none for a server of this run
        )

    async def close(self) -> None:
        await self._client.aclose()

    # ------------------------------------------------------------ requests

    async def get(self, route: str, timeout_s: float) -> dict[str, Any]:
        return _object(await self._request("GET", route, None, timeout_s), self.url, route)

    async def post(self, route: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply's object; of a reply that is text only, {"text": ...}."""
        return _object(await self._request("POST", route, body, timeout_s), self.url, route)

    async def _request(
        self, method: str, route: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> httpx2.Response:
        try:
            reply = await self._client.request(method, route, json=body, timeout=timeout_s)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise NoAnswerError(f"{self.url}: no connection ({error})", was_sent=False) from None
        except httpx2.TimeoutException:
            raise NoAnswerError(f"{self.url}{route}: no answer within {timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise BrokenConnectionError(f"{self.url}{route}: {str(error) or type(error).__name__}") from None
        if reply.status_code != 200:
            raise ServerError(f"{self.url}{route}: HTTP {reply.status_code}: {_reason(reply)}", reply.status_code)
        return reply

    # ------------------------------------------------------------ what it is

    async def probe(self, timeout_s: float) -> ServerInfo:
        """Raises ServerError also where this SGLang cannot be used here, with the reason."""
        try:
            info, model = await self.get("/server_info", timeout_s), await self.get("/model_info", timeout_s)
        except ServerError as error:
            if error.status == 404:
                raise ServerError(f"{self.url}: no SGLang of a known kind serves there ({error}); use 0.5.23") from None
            raise
        version = str(info.get("version", "of unknown version"))
        weights = model.get("weight_version")
        if not isinstance(weights, str):
            raise ServerError(f"{self.url}: SGLang {version} does not say which weights it serves; use 0.5.23")
        return ServerInfo(
            version=version,
            num_ranks=int(info.get("tp_size", 1)) * int(info.get("pp_size", 1)),
            weights=weights,
            context_length=int(info.get("context_length") or 0),
            needs_begin_and_end=await self._has("/end_weight_update", timeout_s),
        )

    async def _has(self, route: str, timeout_s: float) -> bool:
        """Whether there is such a route. To be asked of one that refuses now: no update is open."""
        try:
            await self.post(route, {}, timeout_s)
        except ServerError as error:
            if error.status == 404:
                return False
            if error.status is None:
                raise
        return True

    async def served_weights(self, timeout_s: float) -> str:
        """Label of the weights that it serves."""
        return str((await self.get("/model_info", timeout_s)).get("weight_version"))

    async def check_replies(self, timeout_s: float) -> None:
        """Raises ServerError where its replies to /generate have not what a trajectory needs."""
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        body = {"input_ids": list(_PROBE_TOKEN_IDS), "sampling_params": sampling, "return_logprob": True}
        meta = (await self.post("/generate", body, timeout_s)).get("meta_info", {})
        missing = [name for name in ("output_token_logprobs", "finish_reason", "weight_versions") if name not in meta]
        if missing:
            raise ServerError(f"{self.url}: replies of this SGLang have no {' and no '.join(missing)}; use 0.5.23")

    async def is_tempered(self, timeout_s: float) -> bool:
        """Whether log-probabilities come from logits divided by the temperature.

        The difference between those of two tokens is then twice as large at temperature 0.5.
        """
        at_one, at_half = [await self._difference(temperature, timeout_s) for temperature in (1.0, 0.5)]
        return abs(at_half - 2 * at_one) < abs(at_half - at_one)

    async def _difference(self, temperature: float, timeout_s: float) -> float:
        sampling = {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True}
        body = {
            "input_ids": list(_PROBE_TOKEN_IDS),
            "sampling_params": sampling,
            "return_logprob": True,
            "token_ids_logprob": list(_PROBE_TOKEN_IDS),
        }
        meta = (await self.post("/generate", body, timeout_s))["meta_info"]
        first, second = (float(entry[0]) for entry in meta["output_token_ids_logprobs"][0])
        return first - second

    # ------------------------------------------------------------ weights

    async def rename_weights(self, label: str, timeout_s: float) -> None:
        """What it serves is called `label` from now on."""
        await self.post("/update_weight_version", {"new_version": label, "abort_all_requests": False}, timeout_s)

    async def load_weights(self, directory: str, label: str, timeout_s: float) -> None:
        """Load a directory in HF format that the server can read; running requests end first, new ones wait.

        Called `label` after that, not with it: where the cache of the old weights is not thrown away at once, responses
        made meanwhile are of both, and must not be taken for the new version's.
        """
        body = {"model_path": directory, "weight_version": UPDATING, "flush_cache": True}
        await self._update("/update_weights_from_disk", body, timeout_s)
        await self.rename_weights(label, timeout_s)

    async def receive_weights(
        self, group: str, tensors: Sequence[tuple[str, str, Sequence[int]]], timeout_s: float
    ) -> None:
        """Enter a broadcast of one flat bucket of (name, dtype, shape) in `group`. What it serves keeps its label."""
        names, dtypes, shapes = zip(*tensors, strict=True)
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        await self._update("/update_weights_from_distributed", body, timeout_s)

    async def _update(self, route: str, body: Mapping[str, Any], timeout_s: float) -> None:
        try:
            await self.post(route, body, timeout_s)
        except ServerError as error:
            # the weights are in, only the cache of the old ones was not thrown away: a request was just ending
            if error.status != 400 or "Weights were updated" not in str(error):
                raise
            # /model_info names the weights before until now; whoever goes by that goes on asking, and it is never idle
            await self.rename_weights(UPDATING, timeout_s)
            await self.post(f"/flush_cache?timeout={timeout_s:g}", {}, timeout_s)

    async def join_group(
        self, name: str, address: tuple[str, int], rank: int, size: int, backend: str, timeout_s: float
    ) -> None:
        """Become ranks `rank` and following of a process group; returns when all of its members have joined."""
        body = {
            "master_address": address[0],
            "master_port": address[1],
            "rank_offset": rank,
            "world_size": size,
            "group_name": name,
            "backend": backend,
        }
        await self.post("/init_weights_update_group", body, timeout_s)

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        """A checksum of each tensor, under the server's own names, of all its ranks."""
        reply = await self.post("/weights_checker", {"action": "checksum"}, timeout_s)
        return dict(_leaves(reply.get("ranks", reply)))


def _leaves(tree: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}")]
    if isinstance(tree, list):
        return [leaf for number, value in enumerate(tree) for leaf in _leaves(value, f"{path}/{number}")]
    return [(path, str(tree))]


def _object(reply: httpx2.Response, url: str, route: str) -> dict[str, Any]:
    try:
        value = reply.json()
    except ValueError:
        return {"text": reply.text}
    if isinstance(value, list):  # a batch
        value = value[0] if value else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ServerError(f"{url}{route}: answered {reply.text[:100]!r}, which is no reply of SGLang")
    return value


def _reason(reply: httpx2.Response) -> str:
    """What a refusal says, in one short line."""
    try:
        value = reply.json()
    except ValueError:
        value = reply.text
    for key in ("message", "error"):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
    return " ".join(str(value).split())[:300] or "no reason given"
