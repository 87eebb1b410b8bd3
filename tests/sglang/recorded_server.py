"""A double of an SGLang server that gives recorded replies, for faults that the real one cannot be made to show."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

from tests.sglang.faulty_proxy import FaultyProxy, Reply
from tests.sglang.recordings import load, recorded


class RecordedServer(FaultyProxy):
    """It generates the recorded tokens, over and over, and keeps no weights but their label."""

    def __init__(self, api_key: str) -> None:
        self._key = f"authorization: bearer {api_key}".lower()
        self._exchanges = load()
        self._is_open = False  # between begin and end
        self.label = "default"  # of the weights that it generates with
        self.told = "default"  # of those that it says it serves
        self.is_tempered = False
        self.is_busy = False  # when it is to load: a request is just ending, and what it cached stays for now
        self.checksums: dict[str, str] = {}  # other than those recorded
        super().__init__("http://nobody:1")

    async def _pass_on(self, request: str, headers: list[str], body: bytes, writer: asyncio.StreamWriter) -> None:
        if self._key not in (line.lower() for line in headers):
            reply = recorded("no_key")
        else:
            reply = self._answer_to(request.split()[1].partition("?")[0], json.loads(body or b"null"))
        await self._reply(reply, writer)

    def _answer_to(self, route: str, body: Any) -> Reply:
        match route:
            case "/server_info":
                return recorded("what_it_is")
            case "/model_info":
                return recorded("what_it_serves", weight_version=self.told)
            case "/generate":
                return Reply(200, json.dumps(self._generated(body)))
            case "/update_weights_from_disk":
                self.label = body["weight_version"]
                if self.is_busy:
                    return recorded("load_refused", message="Weights were updated, but the cache was not flushed")
                self.told = self.label
                return recorded("load")
            case "/update_weight_version":
                self.label = self.told = body["new_version"]
                return recorded("rename")
            case "/begin_weight_update":
                was_open, self._is_open = self._is_open, True
                return recorded("begin_again" if was_open else "begin")
            case "/end_weight_update":
                was_open, self._is_open = self._is_open, False
                return recorded("end" if was_open else "end_of_nothing")
            case "/weights_checker":
                ranks = copy.deepcopy(self._exchanges["checksums"].reply["ranks"])
                ranks[0]["checksums"] |= self.checksums
                return recorded("checksums", ranks=ranks)
            case "/abort_request":
                return recorded("abort")
            case "/flush_cache":
                return recorded("flush")
        return recorded("no_such_route")

    def _generated(self, body: Any) -> dict[str, Any]:
        """The recorded response, made as long as is asked for."""
        reply = copy.deepcopy(self._exchanges["response"].reply)
        number, meta = body["sampling_params"]["max_new_tokens"], reply["meta_info"]
        if "token_ids_logprob" in body:
            is_half = body["sampling_params"]["temperature"] == 0.5
            reply = copy.deepcopy(self._exchanges["two_tokens_at_half" if is_half else "two_tokens_at_1"].reply)
            meta = reply["meta_info"]
            if is_half and self.is_tempered:  # logits divided by 0.5: every difference is twice as large
                first, second = meta["output_token_ids_logprobs"][0]
                second[0] = first[0] + 2 * (second[0] - first[0])
        tokens, entries = reply["output_ids"], meta["output_token_logprobs"]
        reply["output_ids"] = [tokens[i % len(tokens)] for i in range(number)]
        meta["output_token_logprobs"] = [entries[i % len(entries)] for i in range(number)]
        meta["finish_reason"]["length"] = meta["completion_tokens"] = meta["output_token_logprobs_length"] = number
        meta["weight_version"] = self.label
        meta["weight_versions"] = [{"version": self.label, "start": 0, "end": number}]
        return reply
