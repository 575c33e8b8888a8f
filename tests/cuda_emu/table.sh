#!/bin/sh
# Prints the outcomes that test_emu wrote for the three builds side by side. Usage: table.sh fast.table check.table asan.table
set -eu
printf '%-48s %-8s %-8s %-8s\n' "planted fault" fast check asan
paste "$1" "$2" "$3" | awk -F'\t' '{printf "%-48s %-8s %-8s %-8s\n", $1, $2, $4, $6}'
