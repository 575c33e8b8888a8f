#!/bin/sh
# Which folder may include which (docs/design.md, "Arrows"). Usage: tests/lint/includes.sh
# A quoted include is resolved against the including file; its folder must be allowed for that file's folder.
set -eu
cd "$(dirname "$0")/../.."

# folder: what it may include, itself aside. device is device.h; nothing but device/cpu itself includes from device/cpu, and
# device/cuda likewise.
arrows='
include:
base: include
device: base include
device/cpu: device base include
device/cuda: device/cuda/kernels device base include
device/cuda/kernels: device/cuda device base include
checkpoint: device base include
kv: device base include
sample: checkpoint device base include
encode: checkpoint device base include
stream: encode checkpoint device base include
forward: kv encode checkpoint device base include
engine: forward stream sample kv encode checkpoint device base include
api: engine forward stream sample kv encode checkpoint device base include
examples/qvl:
qvl-serve:
'
fail=0
for file in $(find include libqvl qvl-serve examples bindings -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' | LC_ALL=C sort); do
    dir=$(dirname "$file")
    folder=${dir#libqvl/}
    case $folder in
    examples | bindings/*) allowed="" ;;
    *)
        allowed=$(printf '%s' "$arrows" | sed -n "s|^$folder:||p")
        if ! printf '%s' "$arrows" | grep -q "^$folder:"; then
            echo "lint: $file: folder $folder has no line in tests/lint/includes.sh" >&2
            fail=1
        fi
        ;;
    esac
    for inc in $(sed -n 's/^[ \t]*#[ \t]*include[ \t]*"\([^"]*\)".*/\1/p' "$file"); do
        target=$(realpath -m --relative-to=. "$(dirname "$dir/$inc")")
        target=${target#libqvl/}
        [ "$target" = "$folder" ] && continue
        case " $allowed " in *" $target "*) continue ;; esac
        echo "lint: $file includes \"$inc\": $folder must not know $target" >&2
        fail=1
    done
    case $folder in # the outside knows qvl.h only, whatever the quotes
    examples* | bindings/* | qvl-serve)
        if grep -nE '^[ \t]*#[ \t]*include.*(libqvl/|base\.h|engine\.h)' "$file" >&2; then
            echo "lint: $file: only qvl.h may be included" >&2
            fail=1
        fi
        ;;
    esac
done
[ $fail = 0 ] && echo "lint: includes follow the arrows"
exit $fail
