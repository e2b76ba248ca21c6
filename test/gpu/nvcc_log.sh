#!/usr/bin/env bash
# Stands where DeepGEMM looks for its compiler (DG_JIT_NVCC_COMPILER): notes which process compiled what and when,
# and lets the real one ($WARMSTART_REAL_NVCC) do it. One JSON line a kernel in $WARMSTART_COMPILE_LOG.
start=$EPOCHREALTIME
"$WARMSTART_REAL_NVCC" "$@"
status=$?
if [ "$1" != --version ]; then
  end=$EPOCHREALTIME
  # DeepGEMM runs `sh -c "cd ... && compiler ..."`: the rank is the parent of our parent, or our parent itself.
  read -r _ _ _ grandparent _ < "/proc/$PPID/stat"
  # Ticks that our children have taken, of which there are 100 a second.
  read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ user system _ < "/proc/$$/stat"
  printf '{"start": %s, "end": %s, "cpu_s": %d.%02d, "parents": [%s, %s], "status": %s}\n' "$start" "$end" \
    $(((user + system) / 100)) $(((user + system) % 100)) "$PPID" "$grandparent" "$status" >> "$WARMSTART_COMPILE_LOG"
fi
exit "$status"
