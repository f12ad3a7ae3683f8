"""The verbs beside `fit`: sample, verify, evaluate, report, doctor."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser
from jsonargparse.typing import restricted_number_type

from restem_lightning.errors import UserError
from restem_lightning.problems import read_problems
from restem_lightning.unknown_options import likely_meant

# What a column of a pool can hold.
Int64 = restricted_number_type("Int64", int, [(">=", -(2**63)), ("<", 2**63)])


def sample(words: list[str]) -> None:
    """`restem sample`: draws and verifies completions into a folder of parquet parts; resumable.

    With `--replay` it draws one stored completion again instead.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.completion_store import CompletionStore
    from restem_lightning.loop.e_step import EStepParams
    from restem_lightning.loop.parity import measure_parity, parity_warning
    from restem_lightning.loop.quota import check_quota, count_skipped
    from restem_lightning.loop.weights import release_memory
    from restem_lightning.run_dir import write_json
    from restem_lightning.selection import (
        SelectionParams,
        end_with_eos,
        stream_accepted,
        write_accepted,
    )
    from restem_lightning.settings import resolve_policy

    if any(word.partition("=")[0] == "--replay" for word in words):
        _replay(words)
        return
    parser = _sampling_parser(
        "sample",
        "--policy DIR --problems P.jsonl --output DIR",
        "Draws and verifies completions of a policy: the E-step alone. Resumable. With --replay "
        "ADDRESS it draws one stored completion again: see `restem sample --replay --help`.",
    )
    parser.add_argument("--output", type=str, required=True, help="Folder for parts and accepted.")
    parser.add_argument("--iteration", type=Int64, default=1, help="Part of the draws' address.")
    parser.add_class_arguments(SelectionParams, "selection")
    parser.add_class_arguments(EStepParams, "e_step")
    made = _parse(parser, words)
    if made.e_step.stop_at_quota:
        check_quota(made.selection)
    output = Path(made.output)
    store = CompletionStore(output / "completions")
    ends = _draw_sample(made, store)
    funnel: dict[str, Any] = {}
    accepted = stream_accepted(store, made.selection, funnel)
    write_accepted(output / "accepted.parquet", (end_with_eos(one, ends) for one in accepted))
    funnel["num_skipped"] = count_skipped([store], made.sampling.n)
    write_json(output / "funnel.json", funnel)
    print(json.dumps(funnel))
    if made.e_step.parity_completions:
        release_memory()
        parity = measure_parity(
            store,
            resolve_policy(made.policy),
            num_completions=made.e_step.parity_completions,
            device=made.engine.resolve_device(),
        )
        write_json(output / "parity.json", parity)
        if warning := parity_warning(parity, made.policy):
            _warn(warning)
    print(f"completions  {store.folder}\naccepted     {output / 'accepted.parquet'}")


def _draw_sample(made: Any, store: Any) -> tuple[int, ...]:
    """Fills a store; returns the policy's EOS ids and leaves nothing of it in memory."""
    from restem_lightning.loop.e_step import fill_store, prepare_problems
    from restem_lightning.loop.stage import written_first

    with _verifiers(made) as verifiers:
        problems = prepare_problems(
            read_problems(made.problems), verifiers, name="problems", warn=_warn
        )
        stage = _stage(made, verifiers, made.iteration)
        quota = made.selection if made.e_step.stop_at_quota else None
        fill_store(store, problems, stage, e_step=made.e_step, quota=quota, show="sample")
        policy = stage.policy
        return written_first(policy.sampler.eos_ids, stage.template, policy.tokenizer)


def _replay(words: list[str]) -> None:
    """`restem sample --replay`: draws one stored completion again and compares.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.loop.replay import (
        ADDRESS_HELP,
        compare,
        draw_again,
        find_completion,
        policy_that_drew,
    )
    from restem_lightning.loop.stage import engine_record, load_policy
    from restem_lightning.sampler import EngineParams
    from restem_lightning.settings import quiet_libraries

    quiet_libraries()
    parser = _parser(
        "sample", "--replay ADDRESS", "Draws one stored completion again, alone, and compares."
    )
    parser.add_argument("--replay", type=str, required=True, help=f"{ADDRESS_HELP}.")
    parser.add_argument(
        "--policy",
        type=str | None,
        default=None,
        help="Folder of the policy that drew it; if not given, the run folder tells.",
    )
    parser.add_class_arguments(EngineParams, "engine")
    is_asked = {"-h", "--help"} & set(words)  # also right behind --replay
    made = _parse(parser, ["--help"] if is_asked else words)
    folder, stored = find_completion(made.replay)
    drawn_on = json.loads(stored.engine)
    known = drawn_on.keys() & vars(made.engine).keys()  # another version may have others
    parser.set_defaults({f"engine.{name}": drawn_on[name] for name in known})
    made = _parse(parser, words)
    policy = load_policy(policy_that_drew(folder, stored, made.policy), made.engine)
    sample = draw_again(stored, policy)
    found, here = compare(stored, sample), engine_record(made.engine)
    print(policy.text_of(sample))
    print(
        f"\n{len(sample.token_ids)} tokens drawn, {len(stored.completion_ids)} stored, "
        f"{'all' if found.is_equal else f'only the first {found.num_equal}'} equal; largest "
        f"log-prob difference of these {found.max_abs_dlogp:.2g}"
    )
    if not found.is_equal:
        print(
            "equal tokens are promised only where engine.batch_invariant is on, on the same kind "
            f"of machine; stored: {drawn_on['dtype']} on {drawn_on['device']}, batch_invariant "
            f"{drawn_on['batch_invariant']}; now: {here['dtype']} on {here['device']}, "
            f"batch_invariant {here['batch_invariant']}"
        )
        sys.exit(1)


def verify(words: list[str]) -> None:
    """`restem verify`: judges given completions, one output line for each input line.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.settings import VERIFIER_HELP, verifier_setting, verifier_spec
    from restem_lightning.verifiers import verify_file

    parser = _parser(
        "verify",
        "--verifier math --input X.jsonl --output Y.jsonl",
        "Judges given completions: one output line for each input line.",
    )
    parser.add_argument("--verifier", type=verifier_setting, required=True, help=VERIFIER_HELP)
    parser.add_argument(
        "--input",
        type=str,
        required=True,
        help="JSONL with problem_id, completion and the problem's fields on each line.",
    )
    parser.add_argument("--output", type=str, required=True, help="JSONL file to write.")
    parser.add_argument("--workers", type=int, default=1, help="Worker processes.")
    help_text = "Seconds for one completion; the code verifier's own time_limit_s counts instead."
    parser.add_argument("--deadline_s", type=float, default=5.0, help=help_text)
    made = _parse(parser, words)
    if Path(made.output).resolve() == Path(made.input).resolve():
        raise UserError(f"output ({made.output}) must not be the input; give another file")
    counts = verify_file(
        verifier_spec(made.verifier),
        made.input,
        made.output,
        num_workers=made.workers,
        deadline_s=made.deadline_s,
    )
    print(json.dumps(counts))


def evaluate(words: list[str]) -> None:
    """`restem evaluate`: greedy pass@1, pass@k and maj@k of a policy, with 95 % intervals.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.loop.e_step import EStepParams, prepare_problems
    from restem_lightning.loop.evaluate import EvaluationParams, draw_evaluation, measure
    from restem_lightning.run_dir import write_json

    parser = _sampling_parser(
        "evaluate",
        "--policy DIR --problems P.jsonl --n 16 --k 1,4,16",
        "Measures a policy on problems: greedy pass@1, pass@k and maj@k with 95 % intervals.",
        without=("n", "temperature", "top_k", "top_p", "min_p"),
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder for completions and metrics.json; one below runs/evaluate if not given.",
    )
    parser.add_argument("--n", type=int, default=16, help="Completions per problem; 0 for none.")
    parser.add_argument(
        "--k", type=str, default="1", help="The k of pass@k, separated by commas, e.g. 1,4,16."
    )
    parser.add_argument(
        "--greedy", action=ActionYesNo, default=True, help="Whether to measure greedy pass@1."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Of the n completions.")
    parser.add_argument("--top_p", type=float, default=0.95, help="Of the n completions.")
    with likely_meant(parser):
        config = parser.parse_args(words)
    made = parser.instantiate_classes(config)
    if not all(k.strip().isdecimal() for k in made.k.split(",")):
        raise UserError(f"k ({made.k}) must be whole numbers separated by commas, e.g. 1,4,16")
    evaluation = EvaluationParams(
        greedy=made.greedy,
        n=made.n,
        ks=tuple(int(k) for k in made.k.split(",")),
        temperature=made.temperature,
        top_p=made.top_p,
    )
    if not (made.greedy or made.n):
        raise UserError("n (0) with --no_greedy measures nothing; give one of them")
    name = Path(made.problems).name.split(".")[0]
    digest = hashlib.sha256(parser.dump(config).encode()).hexdigest()[:8]
    output = Path(made.output or f"runs/evaluate/{Path(made.policy).name}-{name}-{digest}")
    with _verifiers(made) as verifiers:
        problems = prepare_problems(
            read_problems(made.problems), verifiers, name="problems", warn=_warn
        )
        stage = _stage(made, verifiers, 0)
        draw_evaluation(output, name, problems, evaluation, stage, e_step=EStepParams())
    metrics = measure(output, evaluation)
    write_json(output / "metrics.json", {"evaluation": {name: metrics}})
    print(f"{'metric':16}{'value':>8}   95 % interval   ({len(problems)} problems)")
    for key, value in metrics.items():
        low, high = 100 * value["low"], 100 * value["high"]
        print(f"{key:16}{100 * value['value']:7.1f} %   [{low:.1f}, {high:.1f}]")
    print(f"metrics  {output / 'metrics.json'}")


def report(words: list[str]) -> None:
    """`restem report`: one HTML file about runs, or their metrics as JSON.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.report.html import collect_metrics, iteration_table, write_report

    parser = _parser(
        "report", "RUN_DIR [RUN_DIR ...]", "Writes one self-contained HTML file about runs."
    )
    parser.add_argument("run_dirs", nargs="+", type=str, help="Run folders.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="The HTML file; report.html in the first run folder if not given.",
    )
    parser.add_argument("--json", action="store_true", help="Print all metrics as JSON instead.")
    made = _parse(parser, words)
    if made.json:
        print(json.dumps(collect_metrics(made.run_dirs)))
        return
    for run_dir in made.run_dirs:
        print(f"{run_dir}\n{iteration_table(run_dir)}\n")
    output = write_report(made.run_dirs, made.output or Path(made.run_dirs[0]) / "report.html")
    print(f"report  {output}")


def doctor(words: list[str]) -> None:
    """`restem doctor`: what works on this machine; exit status 1 if something is broken.

    Raises:
        UserError: for a user's mistake.
    """
    from restem_lightning.doctor import as_json, examine, exit_status, shown

    parser = _parser(
        "doctor", "", "Tries out what runs need on this machine; each with the remedy."
    )
    parser.add_argument("--folder", type=str, default="runs", help="Where runs are to be written.")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON instead.")
    made = _parse(parser, words)
    findings = examine(made.folder)
    print(as_json(findings) if made.json else shown(findings))
    sys.exit(exit_status(findings))


def _warn(text: str) -> None:
    print(f"restem: {text}", file=sys.stderr)


def _parser(verb: str, words: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"restem {verb}",
        usage=" ".join(["restem", verb, *words.split(), "[--OPTION VALUE ...]"]),
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    return parser


def _sampling_parser(
    verb: str, words: str, description: str, *, without: Sequence[str] = ()
) -> ArgumentParser:
    from restem_lightning.settings import add_policy_settings, quiet_libraries

    quiet_libraries()
    parser = _parser(verb, words, description)
    add_policy_settings(parser, without=without)
    parser.add_argument("--problems", type=str, required=True, help="JSONL file of problems.")
    parser.add_argument("--seed", type=Int64, default=0, help="Part of the draws' address.")
    return parser


def _parse(parser: ArgumentParser, words: list[str]) -> Any:
    with likely_meant(parser):
        return parser.instantiate_classes(parser.parse_args(words))


def _stage(made: Any, verifiers: Any, iteration: int) -> Any:
    """Returns what draws and judges, as the command line says."""
    from restem_lightning.loop.stage import Stage, load_policy
    from restem_lightning.settings import resolve_policy

    return Stage(
        policy=load_policy(resolve_policy(made.policy), made.engine),
        template=made.prompt,
        verifiers=verifiers,
        params=made.sampling,
        seed=made.seed,
        iteration=iteration,
    )


def _verifiers(made: Any) -> Any:
    from restem_lightning.settings import open_verifiers

    return open_verifiers(made.verifier, made.verification)
