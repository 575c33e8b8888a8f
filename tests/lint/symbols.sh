#!/bin/sh
# What the compiled library refers to and defines. Usage: tests/lint/symbols.sh build/release (after make)
# 1. only base/mem.c asks the C library for memory; 2. nothing prints, exits or aborts; 3. every global symbol begins with qvl_.
# (Sanitizers and fortified builds rename functions: run it on a release build.)
set -eu
cd "$(dirname "$0")/../.."
build=${1:-build/release}
fail=0
memory='malloc|calloc|realloc|reallocarray|free|strdup|strndup|asprintf|vasprintf|posix_memalign|aligned_alloc|memalign|getline|getdelim|open_memstream'
noise='printf|vprintf|fprintf|puts|putchar|fputs|fputc|perror|stdout|stderr|exit|_exit|_Exit|quick_exit|abort|__assert_fail|raise|signal|sigaction'

for object in $(find "$build/libqvl" -name '*.o' | LC_ALL=C sort); do
    source=${object#"$build"/}
    source=${source%.o}.c
    [ -f "$source" ] || case $source in libqvl/device/cpu/kern_*) ;; *) continue ;; esac # an object whose source is gone
    used=$(nm -u "$object" | awk '{print $2}' | sed 's/@.*//; s/^__\(.*\)_chk$/\1/')
    if [ "$source" != libqvl/base/mem.c ]; then
        for s in $(printf '%s\n' "$used" | grep -xE "$memory" || true); do
            echo "lint: $source calls $s: memory comes from base/mem.c only" >&2
            fail=1
        done
    fi
    for s in $(printf '%s\n' "$used" | grep -xE "$noise" || true); do
        echo "lint: $source uses $s: the library never prints, exits or aborts" >&2
        fail=1
    done
done

others=$(nm -g --defined-only "$build/libqvl.a" | awk 'NF == 3 && $3 !~ /^qvl_/ {print $3}')
if [ -n "$others" ]; then
    echo "lint: global symbols without the prefix qvl_:" $others >&2
    fail=1
fi
[ $fail = 0 ] && echo "lint: memory, noise and names of the library are in order"
exit $fail
