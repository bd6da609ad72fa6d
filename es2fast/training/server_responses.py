"""What a training asks its base model, answered beforehand by a server that runs that model.

ES2 needs greedy answers of the base model: to the harmless prompts that bring none and, for a
refusal anchor of its own words, to the harmful ones. A training writes them itself; where an
inference server stands ready, it can. Its answers go into the cache where the training looks, so
the server can be stopped before that begins.

The server gets token ids, so nothing of its own chat template takes part, and it has to say that it
read as many as were sent. That it serves the weights of `model.name` is the user's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from es2fast.config import Config
from es2fast.data import Formatter, Prompt, ResponseCache
from es2fast.endpoint import Endpoint, is_url
from es2fast.errors import UserError
from es2fast.progress import tqdm
from es2fast.training.plan import make_plan, without_machine
from es2fast.training.refusals import answer_tokens, wants_answers
from es2fast.training.responses import response_cache, without_responses

KEY = "ES2FAST_SERVER_API_KEY"
EXPECTED = "URL#MODEL, such as http://localhost:8000/v1#meta-llama/Llama-3.1-8B-Instruct"


@dataclass(frozen=True)
class Written:
    """Answers to one kind of prompts: there before, and written now."""

    kind: str
    known: int
    written: int


def respond(
    config: Config,
    server: str,
    *,
    concurrency: int = 32,
    timeout: float = 600.0,
    tries: int = 5,
    pause: float = 1.0,
) -> tuple[list[Written], ResponseCache]:
    """Fills the cache with all answers of the base model that the run will ask for.

    Args:
        config: the run.
        server: URL#MODEL, the base of an OpenAI-compatible API and the model's name there.
        concurrency: requests at a time.
        timeout, tries, pause: of each request, see `Endpoint`.

    Returns:
        What was written, and the cache.

    Raises:
        UserError: `server` is no such pair; the server cannot be reached, refuses, or does not take
            token ids. What it answered until then is kept.
    """
    url, _, model = server.partition("#")
    if not is_url(url) or not model:
        raise UserError(f"--server: {server!r}: expected {EXPECTED}")
    plan = make_plan(without_machine(config))
    endpoint = Endpoint(
        url, "/completions", name=f"--server: {server}", key=KEY, timeout=timeout, tries=tries,
        pause=pause,
    )  # fmt: skip
    bare = [prompt for prompt in plan.groups.harmless if prompt.response is None]
    asked = [("harmless prompts", bare, config.data.max_response_tokens)]
    if wants_answers(config):
        harmful = without_responses(plan.groups.harmful)
        asked.append(("harmful prompts", harmful, answer_tokens(config)))
    found = []
    for kind, prompts, tokens in asked:
        cache = response_cache(plan, tokens)
        missing = cache.missing(prompts)
        writer = _Writer(endpoint, model, plan.formatter, tokens)
        writer.write(missing, cache, kind, concurrency)
        found.append(Written(kind, len(prompts) - len(missing), len(missing)))
    return found, cache


@dataclass(frozen=True)
class _Writer:
    """tokens: at which an answer is cut."""

    endpoint: Endpoint
    model: str
    formatter: Formatter
    tokens: int

    def write(
        self, prompts: Sequence[Prompt], cache: ResponseCache, kind: str, concurrency: int
    ) -> None:
        """Answers `prompts`; each answer is kept as soon as it is there."""
        pool, failed = ThreadPoolExecutor(concurrency), None
        try:
            asked = {pool.submit(self._answer, prompt): prompt for prompt in prompts}
            title = f"answers to {kind}"
            for done in tqdm(as_completed(asked), title, total=len(asked), disable=not asked):
                if done.cancelled():
                    continue
                if (error := done.exception()) is None:
                    cache.put(asked[done], done.result())
                elif failed is None:  # those already sent may still be answered
                    failed = error
                    self.endpoint.stop.set()
                    for other in asked:
                        other.cancel()
        except BaseException:  # a full disk, Ctrl-C
            self.endpoint.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if failed is not None:
            raise failed

    def _answer(self, prompt: Prompt) -> str:
        ids = self.formatter.prompt_ids(prompt)
        reply = self.endpoint.post({
            "model": self.model,
            "prompt": ids,
            "max_tokens": self.tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,  # or the server takes the model's generation_config.json
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "stop_token_ids": list(self.formatter.stop_token_ids),
        })  # fmt: skip
        try:
            text, read = reply["choices"][0]["text"], reply["usage"]["prompt_tokens"]
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise self.endpoint.error(
                "its reply has no choices[0].text or usage.prompt_tokens; a server is needed that "
                "has /completions, such as vLLM or SGLang"
            ) from None
        if read != len(ids):
            raise self.endpoint.error(
                f"it read {read} tokens where {len(ids)} were sent; a server is needed that takes "
                "token ids as they are, such as vLLM or SGLang, with the model of model.name"
            )
        return text
