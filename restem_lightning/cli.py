"""The command line: `restem VERB ...`; every user's mistake ends in one line."""

import errno
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError

from restem_lightning import __version__
from restem_lightning.command_words import check_words
from restem_lightning.errors import UserError

VERBS = {
    "fit": "run ReST^EM: sample, verify, select, fine-tune, evaluate; resumes an unfinished run",
    "sample": "draw and verify completions of a policy (the E-step alone), or draw one again",
    "verify": "judge given completions",
    "evaluate": "measure a policy: greedy pass@1, pass@k, maj@k",
    "compare": "run arms over seeds: one table with intervals and paired tests; resumable",
    "report": "write the HTML report of runs, or print their metrics as JSON",
    "plan": "say what a run will take: tokens, time, memory, disk",
    "doctor": "say what works on this machine, each with the remedy",
}

# Where a verb's function is, if not in `commands`; imported when it is called.
MODULES = {"fit": "fit", "compare": "compare", "plan": "plan.command"}

# A place that cannot be written is for the user to mend; any other OSError is a fault of ours.
UNWRITABLE = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Runs a verb; a user's mistake ends in one line and exit status 2.

    Args:
        args: the words after `restem`, from the command line if None.
    """
    words = list(sys.argv[1:] if args is None else args)
    verb = words[0] if words else "--help"
    _quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file shows a line when it is printed
        sys.stdout.reconfigure(line_buffering=True)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own classes lie beside their configs
    try:
        if verb in ("-h", "--help", "--version"):
            print(__version__ if verb == "--version" else _usage())
            return
        command = _command(verb)
        check_words(words[1:])
        command(words[1:])
    except (UserError, ArgumentError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"restem {verb}: error: {' '.join(lines)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has what it wants
        print(f"restem {verb}: stopped, the reader of its output is gone", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains at its end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        file = error.filename2 or error.filename  # of a copy the second is the one written
        place = f" ({file})" if file else ""
        print(
            f"restem {verb}: error: {os.strerror(error.errno)}{place}; free space or mend the "
            "permissions and give the same command again, or write elsewhere",
            file=sys.stderr,
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"restem {verb}: error: out of memory ({str(error).partition(chr(10))[0]}); lower "
            "engine.max_batch_size, engine.cache_tokens or sampling.n if it was sampling, "
            "data.tokens_per_micro_batch if it was training, and give the same command again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        again = "" if verb == "verify" else "; the same command goes on"
        print(f"\nrestem {verb}: stopped{again}", file=sys.stderr)
        sys.exit(130)


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether Python or torch, on a GPU or a CPU, had no more memory to give."""
    names = [kind.__name__ for kind in type(error).__mro__]  # torch need not be imported for this
    text = "can't allocate memory"  # of torch's allocator for the CPU, torch 2.13
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or text in str(error)


def _usage() -> str:
    lines = [f"  {name:10}{text}" for name, text in VERBS.items()]
    return "\n".join(
        [
            "usage: restem VERB [options]     (restem VERB --help explains the options)",
            "",
            "ReST^EM self-training for language models on problems whose answers can be checked.",
            "",
            *lines,
        ]
    )


def _command(verb: str) -> Callable[[list[str]], None]:
    if verb not in VERBS:
        raise UserError(f"unknown verb; choose one of {', '.join(VERBS)}")
    module = importlib.import_module(f"restem_lightning.{MODULES.get(verb, 'commands')}")
    return getattr(module, verb)


def _quiet_libraries() -> None:
    """Keeps warnings of other libraries off the screen; what matters is raised or shown by us."""
    warnings.filterwarnings("ignore", module="lightning|torch|transformers|jsonargparse")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
