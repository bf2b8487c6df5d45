"""Short tasks of EleutherAI's lm-evaluation-harness, for the base and the tuned model: what an extension costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.eval.identity import content_digest, versions
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item


@dataclass
class Harness:
    """One task of lm-eval, on the model in memory and, if it has a base, on the base.

    Args:
        task: lm-eval's name.
        limit: ask only the first questions, this many; None: all.
        include_path: a folder of task files.
        num_fewshot: None: the task's own.

    Raises:
        ImportError: lm-eval is not installed. ValueError: it does not know the task.
    """

    task: str
    limit: int | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = f"lm-eval {self.task}"
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                f"Task {self.task!r} is not one of this package's, and lm-eval, which may know it, is not installed: "
                f"pip install 'peft-longlora[eval]'"
            ) from error
        # The user's own files first: reading all of lm-eval's takes long.
        for options in [dict(include_path=self.include_path, include_defaults=False)] * bool(self.include_path) + [{}]:
            self._manager = TaskManager(**options)
            if self._manager.match_tasks([self.task]):
                break
        else:
            raise ValueError(
                f"Task {self.task!r} is neither one of this package's nor one of lm-eval's. `longlora eval --help` "
                f"lists the former, `lm-eval ls tasks` the latter."
            )

    @property
    def parameters(self) -> dict[str, Any]:
        """What changes the questions and their scores."""
        asked = {"limit": self.limit, "num_fewshot": self.num_fewshot}
        own = (
            sorted(path for path in Path(self.include_path or "").rglob("*") if path.is_file())
            if self.include_path
            else []
        )
        files = content_digest(*(part for path in own for part in (path.name, path.read_bytes()))) if own else None
        return {**asked, "include_path": files, "lm_eval": versions("lm_eval").get("lm_eval")}

    def data(self) -> None:
        """lm-eval gets its own data."""
        return None

    def check(self, subject: Subject) -> None:
        """lm-eval checks its own tasks."""

    def items(self, subject: Subject) -> Iterator[Item]:
        """One item a variant."""
        variants = list(dict.fromkeys(["base", subject.variant]))
        for number, variant in enumerate(variants, 1):

            def measure(variant: str = variant) -> dict[str, Any]:
                with subject.as_variant(variant) as one:
                    return self._measure(one)

            yield Item(f"{self.name}/{variant}", self.name, number / len(variants), measure)

    def _measure(self, subject: Subject) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
        found = simple_evaluate(
            model=model,
            tasks=[self.task],
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            task_manager=self._manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
        return self.record(found, subject.variant)

    def record(self, found: dict[str, Any], variant: str) -> dict[str, Any]:
        """The sample of a variant, from what lm-eval found."""
        values = found["groups" if self.task in found.get("groups", {}) else "results"][self.task]
        is_higher_better = found["higher_is_better"].get(self.task, {})
        measures, errors, lower_is_better = [], {}, []
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if "_stderr" in metric or not isinstance(value, int | float) or isinstance(value, bool) or not kind:
                continue
            shown = metric if kind == "none" else f"{metric} ({kind})"
            # A ratio of that name is a loss in nats, here and in `results`.
            measures.append([shown, None, math.log(value) if shown == "perplexity" else value, 1])
            lower_is_better += [shown] if is_higher_better.get(metric) is False else []
            error = values.get(f"{metric}_stderr,{kind}")
            if isinstance(error, int | float):
                errors[shown] = error
        shots = found["n-shot"].get(self.task, 0)
        questions = found["n-samples"].get(self.task, {}).get("effective")
        return {
            "key": f"{self.name}/{variant}",
            "task": self.name,
            "dataset": self.task,
            "protocol": f"lm-eval, {shots}-shot",
            "variant": variant,
            "length": None,
            "unit": self.task,
            "content": content_digest(self.task, questions, shots, found.get("versions", {}).get(self.task)),
            "measures": measures,
            "standard_errors": errors,
            "lower_is_better": lower_is_better,
            "questions": questions,
        }
