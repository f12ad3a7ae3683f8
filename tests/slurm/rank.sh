#!/usr/bin/env bash
# Stands for `restem` in launch.sbatch: rank.sh fit stops ... | fails FOLDER ...
case $2 in
    stops) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 75 ;;
    fails)
        if [ "$SLURM_PROCID" -eq 0 ]; then
            # A task that is only just being started would not hear srun's SIGTERM.
            until [ -e "$3/hears" ]; do sleep 0.1; done
            exit 2
        fi
        trap 'exit 1' TERM # as a rank that hears that another one is lost
        touch "$3/hears"
        for _ in $(seq 300); do sleep 0.1; done
        ;;
esac
