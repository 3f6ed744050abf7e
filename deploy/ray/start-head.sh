#!/bin/sh
# Start the head of a Ray cluster and the application on it; ends when either does, so that whoever started it knows.
# RAY_HEAD_CPUS: CPUs of this machine that replicas may not have but the processes at the address do.
set -eu
ray start --head --port=6379 --num-cpus="${RAY_HEAD_CPUS:-2}" --num-gpus="${RAY_HEAD_GPUS:-0}" \
    --object-store-memory="${RAY_OBJECT_STORE_BYTES:-500000000}" --metrics-export-port=8080 --disable-usage-stats
exec serve run --address=auto "${1:-/etc/deepseek-vl2/serve.yaml}"
