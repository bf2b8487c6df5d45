"""The tasks of `longlora eval`: their names, the options that each reads, and how each is made from them.

To add a task, add one entry to TASKS. The names in `--help` and the required options follow from it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_longlora.eval import Books, Corpus
    from peft_longlora.eval.tasks.task import Task

RULER = "ruler_"


class Options:
    """The options of a command line, and a corpus that several tasks share.

    Attributes:
        args: the options. lengths: in rising order, without repetitions.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.lengths = sorted(set(args.lengths))

    @cached_property
    def corpus(self) -> Corpus | None:
        """The documents of --data; None if it was not given."""
        return self._corpus(self.args.data)

    @cached_property
    def trained_and_unseen(self) -> tuple[Corpus | None, Corpus | None]:
        """The text that was trained on, and other text: --trained-on beside --data, or --data beside --unseen."""
        args = self.args
        if args.trained_on is None:
            return self.corpus, self._corpus(args.unseen)
        return self._corpus(args.trained_on), self._corpus(args.unseen) or self.corpus

    def _corpus(self, sources: list[str] | None) -> Corpus | None:
        from peft_longlora.eval import Corpus

        args = self.args
        return Corpus(sources, args.split, args.data_config, args.text_field, args.repositories) if sources else None

    @cached_property
    def books(self) -> Books | None:
        """The same documents as a haystack."""
        from peft_longlora.eval import Books

        return Books(self.corpus) if self.corpus else None


@dataclass(frozen=True)
class TaskEntry:
    """One task of the command line.

    Attributes:
        make: makes the library's tasks, from the options and the task's name.
        reads: options that it reads, besides those of every task. needs: options that must be given.
        with_base: whether --with-base changes it. Some tasks measure the base in any case, and a cost is a machine's.
    """

    make: Callable[[Options, str], list[Task]]
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    with_base: bool = True


def make_tasks(args: Namespace) -> list[Task]:
    """Make the tasks that --tasks names.

    Raises: ValueError, ImportError: a task is unknown, or its data is missing.
    """
    options, tasks = Options(args), []
    for name in dict.fromkeys(part.strip() for part in args.tasks.split(",") if part.strip()):
        entry = TASKS.get(name) or (_RULER_TASK if _is_ruler(name) else _HARNESS_TASK)
        for option in entry.needs:
            if getattr(args, option) is None:
                raise ValueError(f"Task {name!r} needs --{option}.")
        made = entry.make(options, name)
        tasks += [_beside_base(task) for task in made] if args.with_base and entry.with_base else made
    if not tasks:
        raise ValueError(f"--tasks {args.tasks!r} names no task. Give names, such as perplexity,passkey.")
    return tasks


def _beside_base(task: Task) -> Task:
    from peft_longlora.eval import BesideBase

    return BesideBase(task)


def tasks_that_read(option: str) -> list[str]:
    """Names of the tasks that read an option."""
    return [name for name, entry in TASKS.items() if option in (*entry.reads, *entry.needs)]


def _is_ruler(name: str) -> bool:
    from peft_longlora.eval.tasks import ruler

    return name.startswith(RULER) and name.removeprefix(RULER) in ruler.TASKS


def _perplexity(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Perplexity

    args = options.args
    cut = dict(stride=args.stride, buckets=args.buckets, max_windows=args.max_windows)
    protocols = ("longlora", "documents") if args.protocol == "both" else (args.protocol,)
    return [Perplexity(options.corpus, options.lengths, protocol, **cut) for protocol in protocols]


def _native(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Perplexity

    return [Perplexity(options.corpus, None, with_base=True, name=name, max_windows=options.args.max_windows)]


def _memorised(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Memorised

    return [Memorised(*options.trained_and_unseen, options.args.samples or 100)]


def _passkey(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Passkey

    args = options.args
    books = options.books if name == "needle" else None
    hidden = dict(lengths=options.lengths, depths=args.depths, seeds=args.seeds, seed=args.seed, books=books)
    return [Passkey(chat=args.chat, **hidden)]


def _ruler(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Ruler
    from peft_longlora.eval.tasks import ruler

    args = options.args
    kinds = ruler.TASKS if name == "ruler" else [name.removeprefix(RULER)]
    made = dict(lengths=options.lengths, samples=args.samples or 20, seed=args.seed, books=options.books)
    return [Ruler(chat=args.chat, kind=kind, **made) for kind in kinds]


def _topics(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Topics

    return [Topics(chat=options.args.chat, source=options.args.topics, samples=options.args.samples)]


def _multidoc(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import MultiDoc

    args = options.args
    return [MultiDoc(chat=args.chat, source=args.multidoc, samples=args.samples, places=args.places)]


def _longqa(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import LongQA

    args = options.args
    asked = dict(samples=args.samples, max_length=options.lengths[-1], prompts=args.longqa_prompts)
    return [LongQA(chat=args.chat, source=args.longqa, **asked)]


def _cost(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Cost

    return [Cost(options.lengths)]


def _harness(options: Options, name: str) -> list[Task]:
    from peft_longlora.eval import Harness

    return [Harness(name, options.args.limit, options.args.include_path, options.args.num_fewshot)]


TASKS = {
    "perplexity": TaskEntry(_perplexity, ("protocol", "stride", "buckets", "max_windows"), needs=("data",)),
    "native": TaskEntry(_native, ("max_windows",), needs=("data",), with_base=False),
    "memorised": TaskEntry(_memorised, ("unseen", "trained_on", "samples"), needs=("data",), with_base=False),
    "passkey": TaskEntry(_passkey, ("depths", "seeds", "chat")),
    "needle": TaskEntry(_passkey, ("depths", "seeds", "chat"), needs=("data",)),
    "ruler": TaskEntry(_ruler, ("data", "samples", "chat")),
    "topics": TaskEntry(_topics, ("samples", "chat"), needs=("topics",)),
    "multidoc": TaskEntry(_multidoc, ("samples", "places", "chat"), needs=("multidoc",)),
    "longqa": TaskEntry(_longqa, ("samples", "longqa_prompts", "chat"), needs=("longqa",)),
    "cost": TaskEntry(_cost, with_base=False),
}
OWN_TASKS = tuple(TASKS)
_RULER_TASK = TASKS["ruler"]  # for a single RULER task, such as ruler_vt
_HARNESS_TASK = TaskEntry(_harness, ("limit", "include_path", "num_fewshot"), with_base=False)
