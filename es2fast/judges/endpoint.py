"""A judge behind an OpenAI-compatible server: `openai:URL#MODEL`, URL up to and with /v1.

Any server with POST /chat/completions will do: a local vLLM, llama.cpp or Ollama, or a provider.
The API key is read from ES2FAST_JUDGE_API_KEY and sent to that URL alone. The model is asked in our
own words (`prompts/endpoint.txt`), at temperature 0, and has to answer in one word.

Answers of a model under attack may try to talk to the judge; the prompt tells it not to listen,
which helps and proves nothing. Calibrate before you trust it (`es2fast judges --calibrate`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from es2fast.endpoint import Endpoint, is_url
from es2fast.errors import UserError
from es2fast.judges.asked import AskedJudge
from es2fast.judges.base import VERDICTS, Verdict
from es2fast.judges.presets import fill, read_prompt

KEY = "ES2FAST_JUDGE_API_KEY"
NEW_TOKENS = 1024  # one word is enough, but a reasoning model thinks first


class EndpointJudge(AskedJudge):
    """Asks a server about every answer, several at a time.

    Args:
        url: base of the API, such as http://localhost:8000/v1.
        model: as the server calls it.
        timeout: seconds for one request.
        tries: requests before it is given up; 429, 5xx and broken connections are tried again.
        pause: seconds before the second try, doubled each time (a Retry-After header counts more).
        concurrency: requests at a time.

    Raises:
        UserError: not a URL; when asked: no server there, or one that refuses.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        tries: int = 5,
        pause: float = 1.0,
        concurrency: int = 8,
    ):
        super().__init__()
        if not is_url(url) or not model:
            raise UserError(
                f"evaluate.judge: openai:{url}#{model}: expected openai:URL#MODEL, such as "
                "openai:http://localhost:8000/v1#Qwen3-8B"
            )
        self.name = f"openai:{url}#{model}"
        self._endpoint = Endpoint(
            url, "/chat/completions", name=f"evaluate.judge: {self.name}", key=KEY,
            timeout=timeout, tries=tries, pause=pause,
        )  # fmt: skip
        self._model, self._concurrency = model, concurrency
        self._prompt = read_prompt("endpoint")

    @property
    def identity(self) -> str:
        return f"{self.name} {hashlib.sha256(self._prompt.encode()).hexdigest()[:12]}"

    def opinions(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict | None]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            return list(pool.map(self._opinion, pairs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _opinion(self, pair: tuple[str, str]) -> Verdict | None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": fill(self._prompt, *pair)}],
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
        }
        reply = self._endpoint.post(body)
        try:
            return parse_word(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise self._endpoint.error("its reply has no choices[0].message.content") from None


def parse_word(text: str) -> Verdict | None:
    """The one word a judge was asked for, thoughts before it left out; None: anything else."""
    said = re.sub(r"^.*</think>", "", text, flags=re.DOTALL)
    word = said.strip().strip(".*\"'`").casefold()
    return next((verdict for verdict in VERDICTS if verdict == word), None)
