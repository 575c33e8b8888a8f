#!/bin/sh
# Each kernel object exports its own init function and nothing else. Were there a second global symbol, the linker could
# pick the copy compiled for a newer instruction set for everybody, and older CPUs would stop with SIGILL.
# Use: tests/lint/kern_symbols.sh [folder with kern_*.o], by default that of the release build.
set -eu
dir=${1:-build/release/libqvl/device/cpu}
found=0
bad=0
for o in "$dir"/kern_*.o; do
    [ -e "$o" ] || continue
    found=$((found + 1))
    isa=$(basename "$o" .o)
    want="qvl__$isa"
    have=$(nm -g --defined-only "$o" | awk 'NF == 3 {print $3}' | sort | tr '\n' ' ')
    if [ "$have" != "$want " ]; then
        echo "$o: exports \"$have\", but only $want is allowed"
        bad=1
    fi
    # What it may ask of others: the C library.
    other=$(nm -u "$o" | awk '{print $2}' | grep -v -x -E 'mem(cpy|set|move)|sqrtf|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|__(asan|ubsan|tsan)_.*' || true)
    if [ -n "$other" ]; then
        echo "$o: needs" $other
        bad=1
    fi
done
[ "$found" -gt 0 ] || { echo "no kern_*.o in $dir: build first"; exit 1; }
[ "$bad" -eq 0 ] && echo "kern_symbols: $found objects, one export each"
exit $bad
