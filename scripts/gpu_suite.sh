#!/usr/bin/env bash
# Everything that only a GPU can tell, on a fresh machine without a network, most important first.
# Usage: bash scripts/gpu_suite.sh [--dry-run] [--seconds S] [--out DIR] [--archive FILE] [STAGE ...]
#   --dry-run   the same stages in small, on the CPU: shows that every command works
#   --seconds S no stage starts, and none goes on, after S seconds (default 550)
#   --out DIR   where logs go (default runs/gpu_suite); benchmarks append to
#               scripts/benchmarks/results/*.jsonl as soon as they have a line, copied to DIR too
#   --archive FILE  all of DIR in one file, renewed after each stage (default DIR.tgz)
#   STAGE       only these, in this order; default: all of
#               environment kernels engine sampler bench_kernels m_step baselines shapes fit
#               sanitizer growth
# Machines that end a command after ten minutes: first `environment kernels engine sampler`, then
# `bench_kernels m_step shapes`, then `baselines bench_kernels fit`: FlashAttention 3 comes with vLLM.
# Needs a python3 (or PYTHON) with torch, triton, transformers, lightning and pytest. What else is
# missing there (jsonargparse for one) is taken from pieces/, as scripts/offline.py packs it, a part
# with each call if need be: OFFLINE (default /tmp/offline) keeps it. From there too: SmolLM2-135M
# (else POLICY, else models/SmolLM2-135M-Instruct), GSM8K (else GSM8K, else data/gsm8k, a folder with
# train.jsonl.gz and test.jsonl.gz), vLLM (else VLLM_PYTHON) and TRL (else TRL_PYTHON). Without git
# history BENCH_COMMIT is the commit, else a hash of the sources.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
offline=${OFFLINE:-/tmp/offline}
dry=no seconds=550 out=runs/gpu_suite archive='' stages=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --seconds) seconds=$2; shift ;;
        --out) out=$2; shift ;;
        --archive) archive=$2; shift ;;
        -*) sed -n '2,21s/^# \{0,1\}//p' "$0"; [ "$1" = --help ]; exit $((2 * $?)) ;;
        *) stages+=("$1") ;;
    esac
    shift
done
[ ${#stages[@]} -gt 0 ] || stages=(environment kernels engine sampler bench_kernels m_step baselines
    shapes fit sanitizer growth)
mkdir -p "$out"
archive=${archive:-$out.tgz}
[ ! -d pieces ] || "$python" scripts/offline.py unpack pieces --to "$offline"

# Where a package was unpacked, an interpreter that sees it; else one that may have it.
interpreter() {
    if [ ! -d "$offline/$1" ]; then echo "$2"; return; fi
    printf '#!/bin/sh\nPYTHONPATH=%s exec %s "$@"\n' "$offline/$1" "$python" > "$offline/$1.sh"
    chmod +x "$offline/$1.sh"
    echo "$offline/$1.sh"
}
vllm=$(interpreter vllm "${VLLM_PYTHON:-$python}")
trl=$(interpreter trl "${TRL_PYTHON:-$python}")
policy=${POLICY:-models/SmolLM2-135M-Instruct}
[ ! -d "$offline/policy" ] || policy=$offline/policy
gsm8k=${GSM8K:-data/gsm8k}
[ ! -d "$offline/gsm8k" ] || gsm8k=$offline/gsm8k
export PYTHONPATH="$PWD:$PWD/kernels:$offline/ours" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1
if [ -z "${BENCH_COMMIT:-}" ] && ! git rev-parse HEAD > /dev/null 2>&1; then
    sources=$(find restem_lightning kernels scripts -name '*.py' | sort | xargs cat | sha256sum)
    export BENCH_COMMIT=sources-${sources:0:12}
fi
# Random weights of 7B are 15 GB that are written and read once: to memory, where it has room.
room=$(df --output=avail -k /dev/shm 2> /dev/null | tail -n 1)
[ "$dry" = yes ] || [ "${room:-0}" -lt 40000000 ] || export TMPDIR=/dev/shm
bench="$python scripts/benchmarks"

# Each stage: its limit in seconds, and what it runs. $1 is yes in a dry run. What fails under
# `try` fails the stage at its end, but not what comes behind it.
tries=0
try() { "$@" || { tries=$((tries + 1)); echo "gpu_suite: failed: $*"; }; }
tests() {
    workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 8" || true)
    # shellcheck disable=SC2086
    "$python" -m pytest -q -p no:cacheprovider $workers "$@"
}
limit_environment=60
environment() {
    nvidia-smi 2> /dev/null || echo "no GPU"
    "$python" -m pip list 2> /dev/null |
        grep -iE '^(torch|triton|transformers|lightning|flash|vllm|peft|pyarrow|jsonargparse) ' || true
    "$python" -c 'import torch, transformers, triton; print(torch.version.cuda)'
    "$python" -m restem_lightning --version
    ls "$offline" 2> /dev/null || true
    df -h . "${TMPDIR:-/tmp}"
}
limit_kernels=180
kernels() {
    if [ "$1" = yes ]; then "$python" -m pytest -q --collect-only tests/kernels
    else tests --maxfail=40 --ignore-glob='*/test_c[op]*.py' tests/kernels; fi  # no CPU kernels
}
limit_engine=150
engine() {
    if [ "$1" = yes ]; then "$python" -m pytest -q --collect-only tests/sampler
    else tests tests/sampler/test_gpu.py tests/sampler/test_triton.py; fi
}
fixed="--batch 512 --new-tokens 512 --preamble-tokens 900 --question-tokens 100"
limit_sampler=330
sampler() {
    if [ "$1" = yes ]; then $bench/bench_sampler.py --quick --engines; return; fi
    ours="$bench/bench_sampler.py $fixed --engines"
    try $ours --shape qwen2.5-1.5b --problems 48 --repeats 2
    try $ours --shape qwen2.5-1.5b --problems 16 --profile
    try $ours --shape qwen2.5-7b --problems 32 --repeats 1
    try $ours --shape qwen2.5-0.5b --problems 48 --repeats 2
    try $ours --shape smollm2-135m --problems 48 --repeats 2
    try $ours --shape smollm2-135m --problems 16 --profile
}
limit_bench_kernels=150
bench_kernels() {
    if [ "$1" = yes ]; then $bench/bench_kernels.py --quick
    else PYTHONPATH="$PYTHONPATH:$offline/vllm" $bench/bench_kernels.py --seconds 140; fi
}
limit_m_step=300
m_step() {
    if [ "$1" = yes ]; then $bench/bench_m_step.py --quick --engines shared; return; fi
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} try "$python" -m pytest -q tests/m_step/test_gpu.py
    for shape in qwen2.5-1.5b smollm2-135m qwen2.5-0.5b; do
        try $bench/bench_m_step.py --shape $shape --batch 64 --micro-batch-tokens 16384 \
            --trl-python "$trl" --engine-seconds 90
    done
    try $bench/bench_m_step.py --shape qwen2.5-1.5b --micro-batch-tokens 16384 --compile \
        --engines shared unshared
    try $bench/bench_m_step.py --shape qwen2.5-7b --micro-batch-tokens 8192 --lora --engines shared \
        unshared --trl-python "$trl"
}
limit_baselines=480
baselines() {
    if [ "$1" = yes ]; then $bench/bench_sampler.py --quick --engines generate; return; fi
    other="$bench/bench_sampler.py $fixed --repeats 1 --vllm-python $vllm --engine-seconds 150"
    try $other --shape qwen2.5-1.5b --problems 48 --engines vllm generate
    try $other --shape smollm2-135m --problems 48 --engines vllm
    try $other --shape qwen2.5-7b --problems 32 --engines vllm
    try $other --shape qwen2.5-0.5b --problems 48 --engines vllm
    [ ! -d "$policy" ] || try $bench/bench_sampler.py --policy "$policy" --eos --batch 512 \
        --problems 64 --new-tokens 256 --engines vllm --vllm-python "$vllm" --repeats 1
    try $other --shape qwen2.5-1.5b --problems 48 --engines vllm:unshared generate_batch
}
limit_shapes=300
shapes() {
    if [ "$1" = yes ]; then
        $bench/bench_sampler.py --quick --engines --batch-invariant on
        return
    fi
    ours="$bench/bench_sampler.py $fixed --repeats 1 --engines"
    try $ours --shape qwen2.5-1.5b --problems 48 --batch-invariant on
    for shape in qwen3-1.7b llama-3-8b gemma-3-1b; do try $ours --shape $shape --problems 32; done
    # The later --batch counts.
    for batch in 1024 256 128 64; do
        try $ours --shape qwen2.5-1.5b --problems 32 --batch $batch
    done
}
limit_fit=300
fit() {
    if [ "$1" = yes ]; then
        "$python" -m restem_lightning fit --config configs/gsm8k.yaml --print_config > /dev/null
        return
    fi
    if [ ! -d "$policy" ] || [ ! -d "$gsm8k" ]; then
        echo "no $policy or no $gsm8k: the embedded model instead"
        "$python" -m restem_lightning fit --config configs/quickstart.yaml --engine.device cuda \
            --trainer.accelerator gpu --run_dir "$out/quickstart"
        return
    fi
    "$python" -m restem_lightning fit --config configs/gsm8k.yaml --policy "$policy" \
        --problems.train.init_args.path "$gsm8k" --problems.train.init_args.num 1000 \
        --problems.validation.init_args.path "$gsm8k" \
        --problems.held_out.gsm8k_test.init_args.path "$gsm8k" \
        --problems.held_out.gsm8k_test.init_args.num 256 \
        --trainer.precision bf16-mixed --iterations 1 --run_dir "$out/gsm8k"
    cp "$out"/gsm8k/iteration_*/metrics.json "$out/" || true
}
limit_sanitizer=200
sanitizer() {
    if [ "$1" = yes ]; then echo "compute-sanitizer needs a GPU"; return; fi
    found=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer \
        /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2> /dev/null | head -n 1)
    # Only our kernels are checked: torch's many others would take all the time.
    check="$found --error-exitcode 1 --target-processes application-only"
    for kernel in pieces merge scan draw_from_all draw_from_kept write_kv rotate_and_write \
        add_rms_norm gated_silu; do check+=" --kernel-name kns=${kernel}_kernel"; done
    # Each tensor an allocation of its own, or what lies behind it is the next one's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 try $check --tool memcheck "$python" -m pytest -q -x \
        tests/kernels/test_norm.py tests/kernels/test_activation.py tests/kernels/test_kv_cache.py \
        tests/kernels/test_attention.py -k "not captured and not batch"
    try $check --tool racecheck "$python" -m pytest -q -x tests/kernels/test_sampling.py \
        -k "draw_triton and (ties or forbidden)"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 try $check --tool memcheck "$python" -m pytest -q -x \
        tests/kernels/test_sampling.py -k "draw_triton and (ties or forbidden or groups)"
    try $check --tool racecheck "$python" -m pytest -q -x tests/kernels/test_attention.py -k decoding
}
limit_growth=120
growth() {
    if [ "$1" = yes ]; then $bench/bench_growth.py --quick --seconds 8
    else $bench/bench_growth.py --seconds 110; fi
}

failed=()
for stage in "${stages[@]}"; do
    limit=limit_$stage
    if ! declare -F "$stage" > /dev/null || [ -z "${!limit:-}" ]; then
        echo "gpu_suite: no stage $stage; --help lists them" >&2
        exit 2
    fi
    left=$((seconds - SECONDS))
    if [ $left -lt 10 ]; then
        echo "== $stage: not started, $seconds s are over"
        failed+=("$stage")
        continue
    fi
    [ $left -lt "${!limit}" ] || left=${!limit}
    start=$SECONDS
    export -f try tests "${stage?}"
    export python vllm trl policy gsm8k out bench offline fixed tries
    # SIGINT: pytest then still says what has failed so far, and Python ends what it started.
    timeout --signal=INT --kill-after=15 "$left" bash -euo pipefail \
        -c "$stage $dry; exit \$((tries > 0))" > "$out/$stage.log" 2>&1
    status=$?
    tail -n 12 "$out/$stage.log"
    echo "== $stage: exit $status after $((SECONDS - start)) s, log $out/$stage.log"
    [ $status -eq 0 ] || failed+=("$stage")
    cp scripts/benchmarks/results/*.jsonl "$out/" 2> /dev/null || true
    # All of it in one file, but what a run keeps of models.
    tar -czf "$archive.part" -C "$out" --exclude=policy --exclude=m_step --exclude='*.ckpt' . &&
        mv "$archive.part" "$archive"
done
[ ${#failed[@]} -eq 0 ] || { echo "not passed: ${failed[*]}"; exit 1; }
