#!/usr/bin/env bash
# Stands for `restem` in launch.sbatch: rank.sh fit stops|fails ...
case $2 in
    stops) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 75 ;;
    fails)
        [ "$SLURM_PROCID" -gt 0 ] || exit 2
        trap 'exit 1' TERM # as a rank that hears that another one is lost
        for _ in $(seq 300); do sleep 0.1; done
        ;;
esac
