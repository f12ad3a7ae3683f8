#!/usr/bin/env bash
# Everything that only a GPU can tell, on a fresh machine without a network, most important first.
# Usage: bash scripts/gpu_suite.sh [--dry-run] [--seconds S] [--out DIR] [STAGE ...]
#   --dry-run   the same stages in small, on the CPU: shows that every command works
#   --seconds S no stage starts, and none goes on, after S seconds (default 570)
#   --out DIR   where logs go (default runs/gpu_suite; all in DIR.tgz at the end); benchmarks append to
#               scripts/benchmarks/results/*.jsonl as soon as they have a line, copied to DIR too
#   STAGE       only these, in this order; default: all of
#               environment kernels engine sampler bench_kernels m_step shapes sanitizer fit growth
# Needs a python3 (or PYTHON) with torch, triton, transformers, lightning and pytest. Wheels of what
# else is missing (jsonargparse and docstring-parser, say) are installed from ./wheels if it is
# there. SmolLM2-135M is taken from models/SmolLM2-135M-Instruct (scripts/prepare_smollm2.py) or
# POLICY, GSM8K from data/gsm8k or GSM8K (a folder with train.jsonl.gz and test.jsonl.gz), vLLM from
# VLLM_PYTHON, TRL from TRL_PYTHON (default PYTHON). Without git history BENCH_COMMIT is the commit.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
vllm=${VLLM_PYTHON:-$python}
trl=${TRL_PYTHON:-$python}
policy=${POLICY:-models/SmolLM2-135M-Instruct}
gsm8k=${GSM8K:-data/gsm8k}
dry=no seconds=570 out=runs/gpu_suite stages=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --seconds) seconds=$2; shift ;;
        --out) out=$2; shift ;;
        -*) sed -n '2,16s/^# \{0,1\}//p' "$0"; [ "$1" = --help ]; exit $((2 * $?)) ;;
        *) stages+=("$1") ;;
    esac
    shift
done
[ ${#stages[@]} -gt 0 ] ||
    stages=(environment kernels engine sampler bench_kernels m_step shapes sanitizer fit growth)
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bench="$python scripts/benchmarks"

# Each stage: its limit in seconds, and what it runs. $1 is yes in a dry run.
limit_environment=60
environment() {
    nvidia-smi 2>/dev/null || echo "no GPU"
    [ ! -d wheels ] || "$python" -m pip install --quiet --no-index --find-links wheels wheels/*.whl
    "$python" -m pip list 2>/dev/null |
        grep -iE '^(torch|triton|transformers|lightning|flash|vllm|peft|pyarrow|jsonargparse) ' || true
    "$python" -c 'import torch, transformers, triton; print(torch.version.cuda)'
}
limit_kernels=180
kernels() {
    if [ "$1" = yes ]; then "$python" -m pytest -q --collect-only tests/kernels
    else "$python" -m pytest -q --maxfail=20 --ignore=tests/kernels/test_compile.py tests/kernels; fi
}
limit_engine=150
engine() {
    if [ "$1" = yes ]; then "$python" -m pytest -q --collect-only tests/sampler
    else "$python" -m pytest -q tests/sampler/test_triton.py tests/sampler/test_gpu.py; fi
}
limit_sampler=240
sampler() {
    if [ "$1" = yes ]; then $bench/bench_sampler.py --quick --engines generate; return; fi
    main="--shape qwen2.5-1.5b --batch 512 --new-tokens 512 --problems"
    $bench/bench_sampler.py $main 48 --engines --repeats 2
    $bench/bench_sampler.py $main 16 --profile
    $bench/bench_sampler.py $main 48 --repeats 1 --vllm-python "$vllm" --engine-seconds 120 \
        --engines vllm vllm:unshared generate generate_batch || true
}
limit_bench_kernels=120
bench_kernels() {
    if [ "$1" = yes ]; then $bench/bench_kernels.py --quick
    else $bench/bench_kernels.py --seconds 110; fi
}
limit_m_step=300
m_step() {
    if [ "$1" = yes ]; then $bench/bench_m_step.py --quick --engines shared; return; fi
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} "$python" -m pytest -q tests/m_step/test_gpu.py
    for shape in qwen2.5-1.5b smollm2-135m qwen2.5-0.5b; do
        $bench/bench_m_step.py --shape $shape --batch 64 --micro-batch-tokens 16384 \
            --trl-python "$trl" --engine-seconds 90
    done
    $bench/bench_m_step.py --shape qwen2.5-1.5b --micro-batch-tokens 16384 --compile \
        --engines shared unshared
    $bench/bench_m_step.py --shape qwen2.5-7b --micro-batch-tokens 8192 --lora --engines shared \
        unshared --trl-python "$trl"
}
limit_shapes=400
shapes() {
    if [ "$1" = yes ]; then $bench/bench_sampler.py --quick --engines; return; fi
    [ ! -d "$policy" ] || $bench/bench_sampler.py --policy "$policy" --eos --batch 512 \
        --problems 64 --new-tokens 256 --engines vllm --vllm-python "$vllm" --repeats 1
    for shape in qwen2.5-7b qwen2.5-0.5b smollm2-135m; do
        $bench/bench_sampler.py --shape $shape --batch 512 --problems 32 --new-tokens 512 \
            --engines vllm --vllm-python "$vllm" --repeats 1
    done
    $bench/bench_sampler.py --shape qwen2.5-1.5b --batch 512 --problems 48 --new-tokens 512 \
        --engines --repeats 1 --batch-invariant on
    for shape in qwen3-1.7b llama-3-8b gemma-3-1b; do
        $bench/bench_sampler.py --shape $shape --batch 512 --problems 32 --new-tokens 512 \
            --engines --repeats 1
    done
    for batch in 64 128 256 1024; do
        $bench/bench_sampler.py --shape qwen2.5-1.5b --batch $batch --problems 48 \
            --new-tokens 512 --engines --repeats 1
    done
}
limit_sanitizer=150
sanitizer() {
    if [ "$1" = yes ]; then echo "compute-sanitizer needs a GPU"; return; fi
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 "$python" -m pytest -q -x \
            tests/kernels/test_norm.py tests/kernels/test_kv_cache.py \
            tests/sampler/test_triton.py
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
        --iterations 1 --run_dir "$out/gsm8k"
    cp "$out"/gsm8k/iteration_*/metrics.json "$out/" || true
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
    export -f "${stage?}"
    export python vllm trl policy gsm8k out bench
    timeout "$left" bash -euo pipefail -c "$stage $dry" > "$out/$stage.log" 2>&1
    status=$?
    tail -n 12 "$out/$stage.log"
    echo "== $stage: exit $status after $((SECONDS - start)) s, log $out/$stage.log"
    [ $status -eq 0 ] || failed+=("$stage")
    cp scripts/benchmarks/results/*.jsonl "$out/" 2> /dev/null || true
done
tar -czf "$out.tgz" -C "$out" --exclude=policy --exclude='*.ckpt' . # all of it in one file
[ ${#failed[@]} -eq 0 ] || { echo "not passed: ${failed[*]}"; exit 1; }
