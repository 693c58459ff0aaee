"""`dualpath bench kv`: what quantised KV saves and what it costs in quality, beside KV in the model's own type.

The text is the language reference that comes with CPython: English that everybody has, cut into passages. Each passage goes through the
engine's own prefill, so the very bytes that would be stored and sent are what attention reads. Quality is judged by the model itself,
token by token over all passages: perplexity, how often its first choice is another one, and the Kullback-Leibler divergence of its
predictions from those with unquantised KV.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.kv.geometry import QUANTISED_BYTES
from load_tests.bench.figures import median, show

if TYPE_CHECKING:
    import torch

    from dualpath_ray.engine.model import CausalModel


@dataclass(slots=True)
class Quality:
    """Sums over passages; `loss` and `divergence` in nats, `other_choice` in tokens."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    other_choice: int = 0
    seconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, float]:
        return {
            "perplexity": math.exp(self.loss / self.tokens),
            "divergence_nats": self.divergence / self.tokens,
            "other_first_choice": self.other_choice / self.tokens,
        }


@click.command()
@with_settings
@click.option("--passages", default=8, show_default=True, type=click.IntRange(1), help="Passages of text.")
@click.option("--tokens", default=512, show_default=True, type=click.IntRange(16), help="Tokens in each passage.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(settings: Settings, passages: int, tokens: int, as_json: bool) -> None:
    """Bytes and quality of quantised KV."""
    import torch

    from dualpath_ray.engine.model import load_model
    from dualpath_ray.models.resolve import resolve_model

    torch.set_num_threads(settings.model.threads or 1)
    path = resolve_model(settings.model.spec)
    kinds: list[str | None] = [None, *sorted(QUANTISED_BYTES)]
    models = {kind or settings.model.dtype: load_model(path, dtype=settings.model.dtype, kv_dtype=kind) for kind in kinds}
    texts = _passages(str(path), passages, tokens)
    results = {name: Quality() for name in models}
    with Progress(transient=True, disable=as_json) as progress:
        task = progress.add_task("passages", total=len(texts) * len(models))
        for text in texts:
            exact: torch.Tensor | None = None
            for name, model in models.items():
                start = time.process_time()
                predictions = _predict(model, text)
                results[name].seconds.append(time.process_time() - start)
                exact = predictions if exact is None else exact
                _judge(results[name], text, predictions, exact)
                progress.advance(task)
    plain = settings.model.dtype
    document: dict[str, Any] = {"model": settings.model.name, "passages": passages, "tokens": tokens, "kv": {}}
    rows = []
    for name, quality in results.items():
        entry = quality.as_json()
        entry["bytes_per_token"] = models[name].geometry(settings.model.block_tokens).token_bytes
        entry["bytes_saved"] = models[plain].geometry(1).token_bytes / models[name].geometry(1).token_bytes
        entry["prefill_cpu_vs_plain"] = median([a / b for a, b in zip(quality.seconds, results[plain].seconds, strict=True)])
        document["kv"][name] = entry
        rows.append(
            [
                name,
                f"{entry['bytes_per_token']:,.0f}",
                f"{entry['bytes_saved']:.2f}x",
                f"{entry['perplexity']:.3f}",
                f"{entry['divergence_nats']:.5f}",
                f"{entry['other_first_choice']:.2%}",
                f"{entry['prefill_cpu_vs_plain']:.2f}x",
            ]
        )
    columns = ["KV", "bytes/token", "smaller", "perplexity", "divergence", "other choice", "prefill CPU"]
    show(f"KV types of {settings.model.name}", document, rows, columns, as_json)


def _passages(path: str, count: int, length: int) -> list[list[int]]:
    """Passages spread evenly over the text. Raises click.UsageError if there is not that much."""
    from pydoc_data import topics

    from tokenizers import Tokenizer

    text = "\n".join(value for _, value in sorted(topics.topics.items()))
    ids: list[int] = Tokenizer.from_file(f"{path}/tokenizer.json").encode(text, add_special_tokens=False).ids
    if count * length > len(ids):
        raise click.UsageError(f"the text has {len(ids)} tokens of this model: fewer than {count} passages of {length}")
    step = len(ids) // count
    return [ids[start : start + length] for start in range(0, count * step, step)]


def _predict(model: CausalModel, text: list[int]) -> torch.Tensor:
    """Log-probabilities `[len(text) - 1, vocabulary]` of each next token, with KV through the model's codec."""
    import torch

    from dualpath_ray.engine.attention import CausalAttention
    from dualpath_ray.engine.memory import kv_tensor

    attention = CausalAttention(model.device, model.torch_dtype)
    rows = kv_tensor((len(text),), model.geometry(1), model.device)

    class Through:
        """AttentionContext of one prompt over rows that every layer uses in turn."""

        def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
            rows[:, 0].copy_(model.kv_codec.encode(key.transpose(0, 1)))
            rows[:, 1].copy_(model.kv_codec.encode(value.transpose(0, 1)))
            out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
            attention(query, model.kv_codec.decode(rows), scale, out)
            return out

    places = torch.arange(len(text))
    return model.forward(torch.tensor(text), places, Through(), rows=places[:-1]).log_softmax(-1)


def _judge(quality: Quality, text: list[int], predictions: torch.Tensor, exact: torch.Tensor) -> None:
    import torch

    following = torch.tensor(text[1:])
    quality.tokens += len(following)
    quality.loss -= float(predictions.gather(1, following[:, None]).sum())
    quality.divergence += float((exact.exp() * (exact - predictions)).sum())
    quality.other_choice += int((predictions.argmax(-1) != exact.argmax(-1)).sum())
