#!/usr/bin/env bash
# Stands where DeepGEMM looks for its compiler (DG_JIT_NVCC_COMPILER): notes which process compiled what and when,
# and lets the real one ($WARMSTART_REAL_NVCC) do it. One JSON line a kernel in $WARMSTART_COMPILE_LOG.
start=$EPOCHREALTIME
"$WARMSTART_REAL_NVCC" "$@"
status=$?
if [ "$1" != --version ]; then
  # DeepGEMM runs `sh -c "cd ... && compiler ..."`: the rank is the parent of our parent, or our parent itself.
  read -r _ _ _ grandparent _ < "/proc/$PPID/stat"
  printf '{"start": %s, "end": %s, "parents": [%s, %s], "status": %s}\n' \
    "$start" "$EPOCHREALTIME" "$PPID" "$grandparent" "$status" >> "$WARMSTART_COMPILE_LOG"
fi
exit "$status"
