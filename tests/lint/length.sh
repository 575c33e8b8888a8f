#!/bin/sh
# No source file has more than 1000 lines, and every C file opens by saying its job. Usage: tests/lint/length.sh
set -eu
cd "$(dirname "$0")/../.."
fail=0
for file in $(find include libqvl qvl-serve examples bindings tests tools -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.sh' |
    LC_ALL=C sort); do
    lines=$(wc -l <"$file")
    if [ "$lines" -gt 1000 ]; then
        echo "lint: $file has $lines lines; 1000 is the most" >&2
        fail=1
    fi
done
for file in $(find libqvl qvl-serve examples bindings -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' | LC_ALL=C sort); do
    if ! head -n 15 "$file" | grep -q 'Job:'; then
        echo "lint: $file does not open with its job, input, output and invariants" >&2
        fail=1
    fi
done
[ $fail = 0 ] && echo "lint: file lengths and openings are in order"
exit $fail
