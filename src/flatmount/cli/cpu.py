"""`flatmount cpu`: what the machine is made of, what its locks and bursts cost, and what would help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from flatmount.cli.common import json_option, open_store, store_root_option, whole
from flatmount.cpu.advise import CAPS, Question, advise, kubernetes, node_labels, pin_process, rank
from flatmount.cpu.bench import burst_figure, run_at, run_bench
from flatmount.cpu.burst import STRATEGIES, stage
from flatmount.cpu.model import Model, fit
from flatmount.cpu.placements import find_placement, placements
from flatmount.cpu.published import LOCK_TABLES, facts, fit_table
from flatmount.cpu.records import to_data
from flatmount.cpu.results import SCHEMA as BENCH_SCHEMA
from flatmount.cpu.results import BenchResult, Burst, BurstFigure, compare, load_bench, same_machine
from flatmount.cpu.topology import Topology, format_list, parse_list, read_topology
from flatmount.cpu.validate import validate
from flatmount.cpu.validation import SCHEMA as VALIDATION_SCHEMA
from flatmount.cpu.validation import load_validation
from flatmount.errors import EXIT_FAILED, EXIT_FINE, UsageError
from flatmount.kernel.namespaces import apart
from flatmount.report import cpu_text
from flatmount.report.cpu import page, topology_page

ANY_IMAGE = "any"
_ERROR_GOAL = 0.15
_MOST_SECONDS = 86_400


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its own verbs."""
    parser = verbs.add_parser(
        "cpu",
        help="what this machine's processors do to a storm",
        description="Half of the story is hardware. Measure this machine in minutes, see where its cliff is, and what "
        "moves it; never told more than was measured.",
        epilog="example: flatmount cpu bench --output here.json && flatmount cpu advise --bench here.json",
    )
    own = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_topology(own)
    _add_bench(own)
    _add_burst(own)
    _add_model(own)
    _add_advise(own)


def _sub(
    own: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_line: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = own.add_parser(name, help=help_line, description=description, epilog=f"example: {example}")
    json_option(parser)
    parser.set_defaults(run=run)
    return parser


def _add_topology(own: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _sub(
        own, "topology", _topology, "sockets, caches, cores and limits",
        "Sockets, NUMA nodes and distances, level-3 caches, SMT siblings, offline processors, what a hypervisor hides, "
        "and control group and affinity limits, from sysfs.",
        "flatmount cpu topology --html machine.html",
    )  # fmt: skip
    parser.add_argument("--sysroot", default="/", metavar="DIR", help="where sys and proc are (default: /)")
    parser.add_argument("--html", metavar="FILE", help="write the picture as a page, too")


def _add_bench(own: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _sub(
        own, "bench", _bench, "measure locks, core-to-core latency and bursts",
        "Locks of seven kinds at each placement, core-to-core latency, and bursts of real mounts in a namespace of its "
        "own (those need root), within a budget.",
        "flatmount cpu bench --budget 60s --output here.json --html here.html",
    )  # fmt: skip
    parser.add_argument("--budget", default="60s", metavar="TIME", help="as in 60s or 3m (default: %(default)s)")
    parser.add_argument("--no-bursts", action="store_true", help="locks and latencies only: no privilege needed")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON, for model, advise and --compare")
    parser.add_argument("--html", metavar="FILE", help="write the page")
    parser.add_argument("--validation", metavar="FILE", help="a result of `cpu model validate` for the page")
    parser.add_argument("--bench", metavar="FILE", help="show this result instead of measuring")
    parser.add_argument("--compare", metavar="FILE", help="an earlier result to compare with")


def _add_burst(own: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _sub(
        own, "burst", _burst, "one burst of real mounts, with every switch",
        "Start containers together in a mount namespace of its own, on a tmpfs. Strategies named together "
        "are interleaved.",
        "flatmount cpu burst --containers 100 --layers 50 --copies 2 --admit 4",
    )  # fmt: skip
    parser.add_argument("--strategies", default=",".join(STRATEGIES), metavar="A,B,...", help="default: %(default)s")
    parser.add_argument("--containers", default="100", metavar="C", help="default: %(default)s")
    parser.add_argument("--layers", default="50", metavar="L", help="default: %(default)s")
    parser.add_argument("--copies", default="0", metavar="N", help="namespace copies for each container (default: 0)")
    parser.add_argument("--admit", metavar="K", help="let no more than K assemble at a time")
    parser.add_argument("--background", default="0", metavar="M", help="mounts that are there before (default: 0)")
    parser.add_argument("--template", action="store_true", help="copy a namespace with one mount, not the host's")
    parser.add_argument("--one-range", action="store_true", help="all containers have the same user range")
    parser.add_argument("--placement", metavar="NAME", help="run on these processors only, as `cpu bench` names them")
    parser.add_argument("--repeats", default="3", metavar="R", help="default: %(default)s")


def _add_model(own: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _sub(
        own, "model", _model, "fit the model, predict, and show how wrong it is",
        "predict: fit six measured bursts and predict others. validate: run bursts that were held out and print the "
        "error (needs root). published: hold the model against what was published about three machines.",
        "flatmount cpu model validate --budget 4m",
    )  # fmt: skip
    parser.add_argument("what", nargs="?", choices=("predict", "validate", "published"), default="predict")
    parser.add_argument("--bench", metavar="FILE", help="a result of `cpu bench --output` (default: measure now)")
    parser.add_argument("--budget", default="240s", metavar="TIME", help="for validate (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the validation as JSON, for the page")
    _question_options(parser)


def _add_advise(own: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _sub(
        own, "advise", _advise, "what would help here, in order",
        "The constant-mount fix, a cap on concurrent starts, pinning the runtime, SMT, another machine: with the "
        "expected gain and how it is known.",
        "flatmount cpu advise --bench here.json --containers 100 --layers 50",
    )  # fmt: skip
    parser.add_argument("--bench", metavar="FILE", help="a result of `cpu bench --output`")
    parser.add_argument("--strategy", default="per-layer", choices=STRATEGIES, help="what the node does today")
    parser.add_argument("--kubernetes", action="store_true", help="print node labels and a preferred affinity")
    parser.add_argument("--rank", nargs="+", metavar="FILE", help="benches of other machines to rank with --bench")
    parser.add_argument("--apply", action="store_true", help="pin the running daemon (--pid) to --placement now")
    parser.add_argument("--pid", metavar="PID", help="of the runtime's daemon, for --apply")
    parser.add_argument("--placement", default="socket", metavar="NAME", help="for --apply (default: %(default)s)")
    _question_options(parser)


def _question_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--containers", default="100", metavar="C", help="started together (default: %(default)s)")
    parser.add_argument("--layers", metavar="L", help="of the image (default: those of --image, or 50)")
    parser.add_argument("--image", metavar="IMAGE", help="take the layers of an image of the store, or `any`: the most")
    store_root_option(parser)
    parser.add_argument("--copies", default="2", metavar="N", help="namespace copies each (default: %(default)s)")
    parser.add_argument("--limit", default="30s", metavar="TIME", help="when a start has failed (default: %(default)s)")


def seconds(text: str, what: str) -> float:
    """A time as in `60`, `60s` or `4m`. Raises: UsageError."""
    unit = {"s": 1, "m": 60}.get(text[-1:], 0)
    number = text[:-1] if unit else text
    return float(whole(number, what, least=1, most=_MOST_SECONDS) * (unit or 1))


def _question(args: argparse.Namespace) -> Question:
    return Question(
        whole(args.containers, "--containers", least=1, most=5000),
        _layers(args),
        whole(args.copies, "--copies", least=0, most=10),
        seconds(args.limit, "--limit"),
        getattr(args, "strategy", "per-layer"),
    )


def _layers(args: argparse.Namespace) -> int:
    if args.layers is not None:
        return whole(args.layers, "--layers", least=1, most=500)
    if args.image is None:
        return 50
    with open_store(args) as store:
        images = store.images() if args.image == ANY_IMAGE else (store.image(args.image),)
    if not images:
        raise UsageError("the store has no image to take layers from", hint="give --layers")
    return max(1, *(len(image.layers) for image in images))


def _print(schema: str, facts_: dict[str, Any]) -> None:
    json.dump({"schema": schema, **facts_}, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def _progress_done() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


def _topology(args: argparse.Namespace) -> int:
    topology = read_topology(args.sysroot)
    if args.html:
        _write(args.html, topology_page(topology))
    if args.json:
        named = {placement.name: list(placement.cpus) for placement in placements(topology)}
        _print("flatmount.cpu-topology/1", {**to_data(topology), "placements": named})
    else:
        print(cpu_text.topology_text(topology))
        for placement in placements(topology):
            print(f"placement {placement.name}: {placement.title}: {format_list(placement.cpus)}")
    return EXIT_FINE


def _bench(args: argparse.Namespace) -> int:
    if args.bench:
        result = load_bench(args.bench)
    else:
        result = run_bench(seconds(args.budget, "--budget"), bursts=not args.no_bursts, progress=_progress)
        _progress_done()
    facts_ = result.to_json()
    if args.output:
        _write(args.output, json.dumps({"schema": BENCH_SCHEMA, **facts_}, indent=1) + "\n")
    if args.html:
        _write(args.html, page(result, load_validation(args.validation) if args.validation else None))
    earlier = load_bench(args.compare) if args.compare else None
    compared = compare(earlier, result) if earlier else ()
    if args.json:
        _print(BENCH_SCHEMA, {**facts_, "compared": to_data(compared)} if args.compare else facts_)
    else:
        print(cpu_text.bench_text(result))
        if earlier:
            print(f"\n{cpu_text.comparison_text(compared)}")
            if not same_machine(earlier, result):
                print("the two results are of different machines")
            if earlier.disturbance.disturbed:
                print(f"the first: {earlier.disturbance.line()}")
    return EXIT_FINE


def _burst(args: argparse.Namespace) -> int:
    bursts = [
        Burst(
            strategy,
            whole(args.containers, "--containers", least=1, most=1000),
            whole(args.layers, "--layers", least=1, most=500),
            whole(args.copies, "--copies", least=0, most=10),
            whole(args.admit, "--admit", least=1, most=1000) if args.admit else None,
            whole(args.background, "--background", least=0, most=90_000),
            args.template,
            args.one_range,
        )
        for strategy in args.strategies.split(",")
    ]
    repeats = whole(args.repeats, "--repeats", least=1, most=1000)
    placement = find_placement(args.placement, read_topology()) if args.placement else None

    def run() -> list[BurstFigure]:
        runs: dict[tuple[Burst, str], list[Any]] = {}
        with stage(bursts[0].layers) as bench:
            for repeat in range(repeats):
                for burst in bursts:
                    _progress(f"{burst}, {repeat + 1} of {repeats}")
                    run_at(bench, burst, placement, runs)
        return [burst_figure(found, name) for (_, name), found in runs.items()]

    found = apart(run)
    _progress_done()
    if args.json:
        _print("flatmount.cpu-burst/1", {"bursts": to_data(tuple(found))})
    else:
        print(cpu_text.table(["burst", "ms", "operations/s", "median container"], map(cpu_text.burst_row, found)))
    return EXIT_FINE


def _model(args: argparse.Namespace) -> int:
    if args.what == "published":
        return _published(args)
    if args.what == "validate":
        return _validate(args)
    question = _question(args)
    bench = load_bench(args.bench) if args.bench else run_bench(30.0, progress=_progress)
    _progress_done()
    model = fit(bench)
    sizes = sorted({1, 10, 20, 50, 100, 200, question.containers})
    predictions = [
        model.predict(dataclasses.replace(question.burst(strategy), containers=size), limit_s=question.limit_s)
        for strategy in STRATEGIES
        for size in sizes
    ]
    predictions += [
        model.predict(dataclasses.replace(question.burst(), admit=cap), limit_s=question.limit_s)
        for cap in CAPS
        if cap < question.containers
    ]
    cliffs = {strategy: model.cliff(question.burst(strategy), question.limit_s) for strategy in STRATEGIES}
    placed = _at_placements(model, bench, question)
    if args.json:
        facts_ = {"model": to_data(model), "predictions": to_data(predictions), "cliffs": cliffs, "placements": placed}
        _print("flatmount.cpu-model/1", facts_)
    else:
        said = {name: f"{cliff[0]} ({cliff[1]}-{cliff[2]})" if cliff else "none" for name, cliff in cliffs.items()}
        print(cpu_text.model_text(model, predictions, question.limit_s, said))
        for name, predicted in placed.items():
            print(f"at {name}: " + (f"{predicted['seconds']:.3g} s" if predicted else "not identified"))
    return EXIT_FINE


def _at_placements(model: Model, bench: BenchResult, question: Question) -> dict[str, dict[str, Any] | None]:
    found: dict[str, dict[str, Any] | None] = {}
    for placement in bench.placements:
        predicted = model.predict_at(question.burst(), placement.name, len(placement.cpus), limit_s=question.limit_s)
        found[placement.name] = to_data(predicted) if predicted else None
    return found


def _validate(args: argparse.Namespace) -> int:
    result = validate(seconds(args.budget, "--budget"), progress=_progress)
    _progress_done()
    facts_ = result.to_json()
    if args.output:
        _write(args.output, json.dumps({"schema": VALIDATION_SCHEMA, **facts_}, indent=1) + "\n")
    if args.json:
        _print(VALIDATION_SCHEMA, facts_)
    else:
        print(cpu_text.validation_text(result))
    beaten = result.median_error < result.interpolation_error
    return EXIT_FINE if result.median_error <= _ERROR_GOAL and beaten else EXIT_FAILED


def _published(args: argparse.Namespace) -> int:
    costs = fit(load_bench(args.bench)).costs if args.bench else None
    found = facts(costs) if costs is not None else facts()
    if args.json:
        tables = [to_data(fit_table(table)) for table in LOCK_TABLES]
        _print("flatmount.cpu-published/1", {"facts": to_data(found), "lock_tables": tables})
    else:
        print(cpu_text.published_text(found))
        print("\nthree knobs, three calibrated facts: that the others fit is weak evidence")
    return EXIT_FINE


def _advise(args: argparse.Namespace) -> int:
    bench = load_bench(args.bench) if args.bench else None
    topology = bench.topology if bench else read_topology()
    if args.apply:
        return _apply(args, topology)
    question = _question(args)
    model, why_not = _fit_or_not(bench)
    found = advise(question, topology, bench, model)
    labels = node_labels(topology, model, question)
    ranked = rank([*([bench] if bench else []), *map(load_bench, args.rank)]) if args.rank else ()
    if args.json:
        feature_file, affinity = kubernetes(labels)
        facts_ = {"advice": to_data(found), "labels": labels, "feature_file": feature_file, "affinity": affinity}
        _print("flatmount.cpu-advice/1", {**facts_, "ranked": to_data(ranked), "no_model": why_not})
        return EXIT_FINE
    print(cpu_text.advice_text(found))
    if why_not:
        print(f"no prediction: {why_not}")
    for place, (name, wall_s, overlaps) in enumerate(ranked, 1):
        print(f"rank {place}: {name}, {cpu_text.spread(wall_s)} s{' - indistinguishable' if overlaps else ''}")
    if args.kubernetes:
        feature_file, affinity = kubernetes(labels)
        print(f"\n# /etc/kubernetes/node-feature-discovery/features.d/flatmount\n{feature_file}\n{affinity}", end="")
        pairs = " ".join(f"{name}={value}" for name, value in labels.items())
        print(f"\n# without Node Feature Discovery: kubectl label node NODE {pairs}")
    return EXIT_FINE


def _fit_or_not(bench: BenchResult | None) -> tuple[Model | None, str]:
    if bench is None:
        return None, "give --bench, a result of `flatmount cpu bench --output`"
    try:
        return fit(bench), ""
    except UsageError as refusal:
        return None, refusal.line()


def _apply(args: argparse.Namespace, topology: Topology) -> int:
    if not args.pid:
        raise UsageError("--apply needs --pid of the runtime's daemon", hint="as in --pid $(pidof containerd)")
    pid = whole(args.pid, "--pid", least=1, most=1 << 22)
    online = {cpu.number for cpu in topology.cpus}
    if args.placement[:1].isdigit():
        try:
            cpus = parse_list(args.placement)
        except ValueError:
            raise UsageError(f"--placement {args.placement!r} is no list of processors", hint="as in 0-23") from None
    else:
        cpus = find_placement(args.placement, topology).cpus
    if not online.issuperset(cpus):
        raise UsageError(f"of {args.placement} not all processors are online", hint=f"there are {format_list(online)}")
    before = pin_process(pid, cpus)
    undo = f"flatmount cpu advise --apply --pid {pid} --placement {format_list(before)}"
    if args.json:
        _print("flatmount.cpu-pinned/1", {"pid": pid, "cpus": list(cpus), "before": list(before), "undo": undo})
    else:
        print(f"process {pid} and what it starts now run on {format_list(cpus)}; undo: {undo}")
        print("this lasts until the daemon restarts; the drop-in of `cpu advise` makes it last")
    return EXIT_FINE
