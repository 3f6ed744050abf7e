#!/bin/sh
# Join the cluster whose head RAY_HEAD names, with all GPUs of this machine, and stay until the head is gone.
set -eu
exec ray start --address="${RAY_HEAD:?HOST:PORT of the head}" --block \
    --object-store-memory="${RAY_OBJECT_STORE_BYTES:-500000000}" --metrics-export-port=8080 --disable-usage-stats
